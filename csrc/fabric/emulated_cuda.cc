// The transport `emulated-cuda`: kernels post mlx5 requests to emulated NICs on the GPU.
//
// For ranks of virtual nodes on one machine. A rank's NICs, one for each plane, and its send queues
// lie in its arena in device memory (carrier/nic.h); its carrier runs the kernel that serves them.
// Direct: kernels fill the queues themselves, with fabric/ibgda.h.
//
// Options: emulated/options.h.

#include <string.h>
#include <unistd.h>

#include <memory>
#include <stdexcept>

#include "../carrier/carrier.h"
#include "../carrier/nic.h"
#include "../carrier/shared_memory.h"
#include "../emulated/counts.h"
#include "../emulated/server.h"
#include "peer_process.h"
#include "report.h"
#include "transport.h"

namespace epcomm::fabric {

namespace {

using carrier::NicAddress;
using carrier::NicArena;
using carrier::NicReport;
using carrier::NicSetup;
using carrier::NicShape;
using carrier::require;
using emulated::Nic;

/// Without a sign of the kernel for so long, it counts as dead.
constexpr int64_t kStallNs = 10'000'000'000;
constexpr int64_t kCountNs = 2'000'000'000;

/// Device memory of this process, zeroed.
class DeviceMemory {
 public:
    explicit DeviceMemory(uint64_t bytes) {
        require(cudaMalloc(&start_, bytes), "memory of the emulated NICs");
        require(cudaMemset(start_, 0, bytes), "memory of the emulated NICs");
    }
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;
    ~DeviceMemory() { cudaFree(start_); }
    uint8_t* start() const { return static_cast<uint8_t*>(start_); }

 private:
    void* start_ = nullptr;
};

class EmulatedCuda : public Transport {
 public:
    ~EmulatedCuda() override { close(); }

    void add_region(const Region& region) override {
        if (region.memory != Memory::kCuda || (device_ >= 0 && region.device != device_)) {
            throw std::runtime_error("transport emulated-cuda: region " +
                                     std::to_string(region.id) +
                                     " must be memory of one and the same GPU");
        }
        device_ = region.device;
        require(cudaSetDevice(device_), "cudaSetDevice");
        mine_.regions[region.id] = carrier::export_memory(region.pointer, region.bytes);
        mine_.region_addresses[region.id] = reinterpret_cast<uint64_t>(region.pointer);
    }

    void open(const Plan& plan) override {
        plan_ = plan;
        options_ = emulated::parse_options(plan.options, uint32_t(plan.num_nodes));
        check_options();
        const uint64_t signals = signals_in(mine_.regions[EPCOMM_FABRIC_SIGNALS].bytes);
        shape_ = {plan.num_nodes, plan.node, plan.num_channels, int32_t(options_.num_planes),
                  int32_t(signals)};
        const NicArena places(shape_);
        arena_ = std::make_unique<DeviceMemory>(places.bytes);
        report_ = std::make_unique<carrier::SharedMemory>(sizeof(NicReport));
        nics_.resize(size_t(shape_.num_planes));
        for (Nic& nic : nics_) nic.line = options_.line;
        register_regions();
        carrier::for_each_queue(shape_, [this](int32_t, int32_t, int32_t, int32_t plane, uint32_t) {
            if (emulated::add_queue(&nics_[size_t(plane)], 1) != 0) return;
            throw std::runtime_error("transport emulated-cuda: an NIC has at most " +
                                     std::to_string(emulated::kMaxQueues) +
                                     " queue pairs, one for each peer and channel");
        });
        mine_.pid = int32_t(getpid());
        mine_.node = plan.node;
        mine_.shape = shape_;
        mine_.clock_ns = emulated::device_time_ns();
        mine_.arena = carrier::export_memory(arena_->start(), places.bytes);
        mine_.arena_address = reinterpret_cast<uint64_t>(arena_->start());
        peers_.resize(size_t(plan.num_nodes));
    }

    std::string address(int32_t peer) override {
        NicAddress theirs = mine_;
        carrier::for_each_queue(
            shape_, [&](int32_t, int32_t to, int32_t channel, int32_t, uint32_t number) {
                if (to == peer) theirs.numbers[channel] = number;
            });
        return std::string(reinterpret_cast<const char*>(&theirs), sizeof theirs);
    }

    void connect(const std::vector<std::string>& addresses) override {
        require(cudaSetDevice(device_), "cudaSetDevice");
        std::vector<NicAddress> all(size_t(plan_.num_nodes), mine_);
        for (int32_t n = 0; n < plan_.num_nodes; ++n) {
            if (n != plan_.node) all[size_t(n)] = checked(n, addresses[size_t(n)]);
            if (n != plan_.node) peers_[size_t(n)].watch(all[size_t(n)].pid);
        }
        fill_arena(all);
        start_carrier(all);
        set_up_producers();
    }

    const epcomm_ibgda* direct() override { return carrier_ == nullptr ? nullptr : &fabric_; }

    void look_after() override {
        std::string why;
        if (carrier_->gone()) {
            why = "the carrier, the process of this rank's emulated NICs, is gone: " +
                  carrier_->last_words();
        } else {
            const uint64_t beat = load_acquire(&shared()->heartbeat_ns);
            const int64_t now = now_ns();
            if (beat != beat_) {
                beat_ = beat;
                beat_at_ns_ = now;
            } else if (now - beat_at_ns_ > kStallNs) {
                why = "the emulated NICs' kernel gives no sign of life";
            }
        }
        if (!why.empty()) report(plan_.state, plain_error(EPCOMM_FABRIC_STALLED, why));
    }

    bool count(epcomm_fabric_traffic* into, bool restart) override {
        NicReport* report = shared();
        report->restart = restart ? 1 : 0;
        const uint64_t asked = report->asked + 1;
        store_release(&report->asked, asked);
        const int64_t until = now_ns() + kCountNs;
        while (load_acquire(&report->answered) != asked) {
            if (now_ns() > until) throw std::runtime_error("the emulated NICs do not answer");
            usleep(200);
        }
        emulated::fill_counts(report->traffic, options_.line, epoch_ns_, into);
        into->num_nics = shape_.num_planes;
        return true;
    }

    bool peer_gone(int32_t node) override { return peers_[size_t(node)].gone(); }

    size_t post(int32_t, const Operation*, size_t) override { return 0; }
    size_t poll(int32_t, Completion*, size_t) override { return 0; }
    std::string error_text(const Completion&) const override { return ""; }

    std::string describe() const override {
        return "emulated-cuda: mlx5 requests by kernels, modelled network of " +
               std::to_string(options_.num_planes) + " x " +
               std::to_string(options_.line.bytes_per_ns) + " GB/s and " +
               std::to_string(options_.line.latency_ns) + " ns, served by " +
               std::to_string(options_.num_blocks) + " SMs";
    }

    /// Of one plane.
    int64_t memory_bytes(int32_t num_nodes, int32_t num_channels,
                         int32_t num_signals) const override {
        return int64_t(NicArena({num_nodes, 0, num_channels, 1, num_signals}).bytes);
    }

    void close() override {
        carrier_.reset();
        report_.reset();
        arena_.reset();
        peers_.clear();
    }

 private:
    NicReport* shared() const { return static_cast<NicReport*>(report_->start()); }

    void check_options() const {
        const auto require_range = [](const char* name, uint32_t value, uint32_t most) {
            if (value >= 1 && value <= most) return;
            throw std::runtime_error(std::string("transport emulated-cuda: ") + name +
                                     ": expected 1 to " + std::to_string(most) + ", got " +
                                     std::to_string(value));
        };
        require_range("planes", options_.num_planes, uint32_t(carrier::kMaxPlanes));
        require_range("blocks", options_.num_blocks, 64);
    }

    void register_regions() {
        for (int32_t plane = 0; plane < shape_.num_planes; ++plane) {
            for (int id = 0; id < EPCOMM_FABRIC_MAX_REGIONS; ++id) {
                const uint64_t bytes = mine_.regions[id].bytes, at = mine_.region_addresses[id];
                if (bytes == 0) continue;
                uint32_t access = emulated::kRemoteWrite;
                // Who moves a lane off a dead plane reads the peer's counters.
                if (id == EPCOMM_FABRIC_SIGNALS) {
                    access |= emulated::kRemoteRead | emulated::kLocalWrite;
                }
                const uint32_t key =
                    emulated::add_key(&nics_[size_t(plane)], {at, bytes, 1, access});
                mine_.keys[plane][id] = {at, bytes, key};
            }
        }
    }

    NicAddress checked(int32_t node, const std::string& bytes) const {
        NicAddress theirs;
        bool fits = bytes.size() == sizeof theirs;
        if (fits) {
            memcpy(&theirs, bytes.data(), sizeof theirs);
            fits = theirs.shape.num_planes == shape_.num_planes &&
                   theirs.shape.num_channels == shape_.num_channels &&
                   theirs.shape.num_signals == shape_.num_signals;
        }
        if (fits) return theirs;
        throw std::runtime_error("transport emulated-cuda: node " + std::to_string(node) +
                                 " uses another transport, version or number of planes");
    }

    uint8_t* at(uint64_t offset) const { return arena_->start() + offset; }

    template <typename T>
    void upload(uint64_t offset, const std::vector<T>& values) const {
        require(cudaMemcpy(at(offset), values.data(), values.size() * sizeof(T),
                           cudaMemcpyHostToDevice),
                "filling the memory of the emulated NICs");
    }

    /// NICs with connected queue pairs, empty queues, and the keys of all.
    void fill_arena(const std::vector<NicAddress>& all) {
        const NicArena places(shape_);
        std::vector<mlx5::SendQueue> queues(size_t(shape_.num_queues()));
        carrier::for_each_queue(shape_, [&](int32_t index, int32_t peer, int32_t channel,
                                            int32_t plane, uint32_t number) {
            mlx5::SendQueue& queue = queues[size_t(index)];
            queue.ring = reinterpret_cast<mlx5::Block*>(at(places.ring(index)));
            queue.completions = reinterpret_cast<mlx5::Completion*>(at(places.completion(index)));
            queue.record = reinterpret_cast<mlx5::Be32*>(at(places.record(index)));
            queue.doorbell = reinterpret_cast<uint64_t*>(at(places.doorbell(index)));
            queue.num_blocks = queue.num_completions = carrier::kQueueDepth;
            queue.number = number;
            mlx5::start_at(&queue, 0);
            emulated::QueueEntry* entry = find_queue(nics_[size_t(plane)], number);
            entry->peer_nic = shape_.nic(peer, plane);
            entry->peer_number = all[size_t(peer)].numbers[channel];
            entry->state = emulated::kReady;
        });
        mlx5::Completion none{};
        none.opcode_owner = mlx5::kInvalid << 4;
        upload(places.completions, std::vector<mlx5::Completion>(
                                       size_t(shape_.num_queues()) * carrier::kQueueDepth, none));
        upload(places.queues, queues);
        std::vector<RegionKey> local, remote;
        for (int32_t n = 0; n < shape_.num_nodes; ++n) {
            for (int32_t plane = 0; plane < shape_.num_planes; ++plane) {
                const RegionKey* keys = all[size_t(n)].keys[plane];
                remote.insert(remote.end(), keys, keys + EPCOMM_FABRIC_MAX_REGIONS);
                if (n != shape_.node) continue;
                local.insert(local.end(), keys, keys + EPCOMM_FABRIC_MAX_REGIONS);
            }
        }
        upload(places.local, local);
        upload(places.remote, remote);
        // Last: from now on peers find the queue pairs ready.
        upload(places.nics, nics_);
        require(cudaDeviceSynchronize(), "filling the memory of the emulated NICs");
    }

    void start_carrier(const std::vector<NicAddress>& all) {
        NicSetup setup{};
        setup.shape = shape_;
        setup.device = device_;
        setup.num_blocks = int32_t(options_.num_blocks);
        setup.num_rules = int32_t(options_.rules.size());
        // Time 0 is a little in the past, because 0 stands for "not yet" in places.
        setup.epoch_ns = epoch_ns_ = all[0].clock_ns - 1'000'000;
        setup.seed = options_.seed;
        std::string bytes(reinterpret_cast<const char*>(&setup), sizeof setup);
        bytes.append(reinterpret_cast<const char*>(options_.rules.data()),
                     options_.rules.size() * sizeof(emulated::FaultRule));
        bytes.append(reinterpret_cast<const char*>(all.data()), all.size() * sizeof(NicAddress));
        carrier_ =
            std::make_unique<carrier::Carrier>("nic", bytes, std::vector<int>{report_->fd()});
        beat_at_ns_ = now_ns();
    }

    void set_up_producers() {
        const NicArena places(shape_);
        fabric_.queues = at(places.queues);
        fabric_.local = reinterpret_cast<const RegionKey*>(at(places.local));
        fabric_.remote = reinterpret_cast<const RegionKey*>(at(places.remote));
        fabric_.raised = reinterpret_cast<uint64_t*>(at(places.raised));
        fabric_.state = plan_.state;
        fabric_.timeout_ns = plan_.timeout_ns;
        fabric_.num_channels = shape_.num_channels;
        fabric_.num_nodes = shape_.num_nodes;
        fabric_.num_planes = shape_.num_planes;
        fabric_.num_signals = shape_.num_signals;
        fabric_.failover = options_.failover;
        fabric_.node = shape_.node;
    }

    Plan plan_{};
    emulated::TransportOptions options_;
    NicShape shape_{};
    NicAddress mine_{};
    int32_t device_ = -1;
    std::vector<Nic> nics_;
    std::unique_ptr<DeviceMemory> arena_;
    std::unique_ptr<carrier::SharedMemory> report_;
    std::vector<PeerProcess> peers_;
    std::unique_ptr<carrier::Carrier> carrier_;
    epcomm_ibgda fabric_{};
    int64_t epoch_ns_ = 0;
    uint64_t beat_ = 0;
    int64_t beat_at_ns_ = 0;
};

const RegisterTransport kRegistered("emulated-cuda", []() -> std::unique_ptr<Transport> {
    return std::make_unique<EmulatedCuda>();
});

}  // namespace

}  // namespace epcomm::fabric
