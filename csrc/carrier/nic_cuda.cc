// The job `nic`: opens the memory of the rail, runs the kernel of the rank's emulated NICs,
// watches.

#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "../emulated/server.h"
#include "../fabric/peer_process.h"
#include "carrier.h"
#include "nic.h"
#include "shared_memory.h"

namespace epcomm::carrier {

namespace {

using emulated::FaultRule;
using emulated::Nic;
using emulated::ServedQueue;
using emulated::Server;

constexpr useconds_t kLookUs = 1000;
constexpr int kLooksPerSign = 100;
/// Counts come to global memory now and then; this is long enough.
constexpr useconds_t kCountUs = 2000;
/// Without a sign of this process for so long, the kernel ends by itself.
constexpr uint64_t kPatienceNs = 20'000'000'000;

/// The setup in parts.
struct Parts {
    NicSetup setup;
    std::vector<FaultRule> rules;
    std::vector<NicAddress> addresses;  ///< by node

    explicit Parts(const std::string& bytes) {
        const char* at = bytes.data();
        const auto take = [&at](void* into, size_t size) {
            memcpy(into, at, size);
            at += size;
        };
        take(&setup, sizeof setup);
        rules.resize(size_t(setup.num_rules));
        take(rules.data(), rules.size() * sizeof(FaultRule));
        addresses.resize(size_t(setup.shape.num_nodes));
        take(addresses.data(), addresses.size() * sizeof(NicAddress));
    }
};

/// Host memory that the device reaches, as long as this lives.
class Pinned {
 public:
    Pinned(void* start, uint64_t bytes) : start_(start) {
        require(cudaHostRegister(start, bytes, cudaHostRegisterMapped),
                "pinning the queues that the rank's proxy threads fill");
        const cudaError_t error = cudaHostGetDevicePointer(&device_, start, 0);
        if (error != cudaSuccess) cudaHostUnregister(start);
        require(error, "reaching the queues that the rank's proxy threads fill");
    }
    Pinned(const Pinned&) = delete;
    Pinned& operator=(const Pinned&) = delete;
    ~Pinned() { cudaHostUnregister(start_); }
    uint8_t* device() const { return static_cast<uint8_t*>(device_); }

 private:
    void* start_;
    void* device_ = nullptr;
};

/// The rail's memory, opened, and the kernel that serves this rank's NICs.
class Nics {
 public:
    Nics(const Parts& parts, void* shared)
        : shape_(parts.setup.shape),
          places_(shape_),
          shared_(shape_),
          report_(static_cast<NicReport*>(shared)) {
        require(cudaSetDevice(parts.setup.device), "cudaSetDevice");
        if (shape_.by_host != 0) pinned_ = std::make_unique<Pinned>(shared, shared_.bytes);
        for (const NicAddress& address : parts.addresses) open(address);
        emulated::ServerOptions options;
        options.num_blocks = uint32_t(parts.setup.num_blocks);
        options.num_planes = uint32_t(shape_.num_planes);
        options.seed = parts.setup.seed;
        options.rules = parts.rules;
        options.patience_ns = kPatienceNs;
        options.max_passages = options.max_events = uint64_t(shape_.max_messages);
        options.epoch_ns = parts.setup.epoch_ns;
        if (pinned_ != nullptr) options.bells = bells();
        server_ = std::make_unique<Server>(wire_, queues(), options);
        server_->start();
    }

    /// Throws once the kernel has ended without being told.
    void look(int turn) {
        if (server_->has_ended()) throw std::runtime_error("the emulated NICs' kernel ended");
        if (fabric::load_acquire(&report_->asked) != report_->answered) answer();
        if (turn % kLooksPerSign != 0) return;
        server_->sign_of_life();
        const emulated::ServerReport seen = server_->look();
        tell_broken_rules(seen.broken_rules);
        fabric::store_release(&report_->heartbeat_ns, seen.heartbeat);
        for (int32_t n = 0; n < shape_.num_nodes; ++n) {
            if (n == shape_.node || !peers_[size_t(n)].gone()) continue;
            // A process that has ended does not answer; its memory would.
            for (int32_t p = 0; p < shape_.num_planes; ++p) server_->kill_nic(shape_.nic(n, p));
        }
    }

 private:
    void open(const NicAddress& address) {
        arenas_.push_back(memory_.open(address.arena));
        peers_.emplace_back();
        if (address.node != shape_.node) peers_.back().watch(address.pid);
        auto* nics = reinterpret_cast<Nic*>(arenas_.back() + places_.nics);
        for (int32_t plane = 0; plane < shape_.num_planes; ++plane) {
            wire_.nics.push_back(nics + plane);
            std::vector<int64_t> shifts(emulated::kMaxKeys);
            for (int id = 0; id < EPCOMM_FABRIC_MAX_REGIONS; ++id) {
                const uint32_t key = address.keys[plane][id].key;
                const uint8_t* here = memory_.open(address.regions[id]);
                if (here == nullptr) continue;
                shifts[key - emulated::kFirstKey] =
                    int64_t(reinterpret_cast<uint64_t>(here) - address.region_addresses[id]);
            }
            wire_.shifts.insert(wire_.shifts.end(), shifts.begin(), shifts.end());
        }
    }

    /// Queue pairs go to blocks by their channel, so that one chunk after the other keeps all busy.
    std::vector<ServedQueue> queues() const {
        uint8_t* arena = arenas_[size_t(shape_.node)];
        uint8_t *rings = arena + places_.rings, *completions = arena + places_.completions;
        if (pinned_ != nullptr) {
            uint8_t* host = pinned_->device() + NicShared::kQueuesAt;
            rings = host + shared_.queues.rings;
            completions = host + shared_.queues.completions;
        }
        std::vector<ServedQueue> all;
        for_each_queue(shape_, [&](int32_t index, int32_t, int32_t channel, int32_t plane,
                                   uint32_t number) {
            ServedQueue queue{};
            queue.memory.ring =
                reinterpret_cast<mlx5::Block*>(rings) + kQueueDepth * uint64_t(index);
            queue.memory.record = reinterpret_cast<mlx5::Be32*>(arena + places_.record(index));
            queue.memory.doorbell = reinterpret_cast<uint64_t*>(arena + places_.doorbell(index));
            queue.memory.completions =
                reinterpret_cast<mlx5::Completion*>(completions) + kQueueDepth * uint64_t(index);
            queue.memory.num_blocks = queue.memory.num_completions = kQueueDepth;
            queue.number = number;
            queue.nic = shape_.nic(shape_.node, plane);
            queue.plane = uint32_t(plane);
            queue.block = uint32_t(channel);
            all.push_back(queue);
        });
        return all;
    }

    emulated::HostBells bells() const {
        uint8_t* arena = arenas_[size_t(shape_.node)];
        emulated::HostBells bells{};
        bells.set_host(shared_.queues, pinned_->device() + NicShared::kQueuesAt,
                       uint32_t(shape_.num_queues()));
        bells.own_doorbells = reinterpret_cast<uint64_t*>(arena + places_.doorbells);
        bells.own_records = reinterpret_cast<uint64_t*>(arena + places_.records);
        return bells;
    }

    void answer() {
        const uint64_t asked = fabric::load_acquire(&report_->asked);
        switch (report_->question) {
            case kTellMessages:
                report_->num_messages =
                    tell(server_->passages(&report_->total_messages), shared_.messages);
                break;
            case kTellEvents:
                report_->num_events =
                    tell(server_->newest_events(&report_->total_events), shared_.events);
                break;
            case kForgetMessages: server_->forget(); break;
            case kTellBrokenRules: tell_broken_rules(server_->look().broken_rules); break;
            default: count(report_->question == kCountAnew);
        }
        fabric::store_release(&report_->answered, asked);
    }

    /// The rank may be looking, so what it has seen stays as it is: the first one does not change.
    void tell_broken_rules(const emulated::BrokenRules& seen) {
        if (report_->broken_rules.count == 0) report_->broken_rules.first = seen.first;
        fabric::store_release(&report_->broken_rules.count, seen.count);
    }

    /// Copy notes to their place in the memory that the rank reads; returns how many.
    template <class Note>
    uint64_t tell(const std::vector<Note>& kept, uint64_t place) {
        auto* into = reinterpret_cast<uint8_t*>(report_) + place;
        std::copy(kept.begin(), kept.end(), reinterpret_cast<Note*>(into));
        return kept.size();
    }

    void count(bool anew) {
        usleep(kCountUs);
        const emulated::ServerReport seen = server_->look();
        report_->traffic = emulated::Traffic();
        for (const emulated::Traffic& traffic : seen.traffic) report_->traffic.add(traffic);
        tell_broken_rules(seen.broken_rules);
        if (!anew) return;
        server_->forget_counts();
        usleep(kCountUs);
    }

    NicShape shape_;
    NicArena places_;
    NicShared shared_;
    NicReport* report_;
    std::unique_ptr<Pinned> pinned_;  ///< with the next, let go of after the kernel has ended
    IpcMappings memory_;
    std::vector<uint8_t*> arenas_;  ///< by node, as the following
    std::vector<fabric::PeerProcess> peers_;
    emulated::ServedWire wire_;
    std::unique_ptr<Server> server_;
};

void run(const std::string& bytes, const std::vector<int>& fds, Session& session) {
    const Parts parts(bytes);
    const SharedMapping mapping(fds.at(0), NicShared(parts.setup.shape).bytes);
    Nics nics(parts, mapping.start());
    session.ready();
    for (int turn = 0; !session.ended(); ++turn) {
        nics.look(turn);
        usleep(kLookUs);
    }
}

const RegisterJob kJob("nic", run);

}  // namespace

}  // namespace epcomm::carrier
