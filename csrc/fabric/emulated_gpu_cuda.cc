#include <string.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>

#include "../emulated/counts.h"
#include "../emulated/server.h"
#include "emulated_gpu.h"
#include "nic_errors.h"
#include "plain_address.h"

namespace epcomm::fabric {

using carrier::NicAddress;
using carrier::NicArena;
using carrier::NicReport;
using carrier::NicSetup;
using carrier::NicShared;
using carrier::require;
using emulated::Nic;

namespace {

/// Without a sign of the kernel for so long, it counts as dead.
constexpr int64_t kStallNs = 10'000'000'000;
constexpr int64_t kAnswerNs = 2'000'000'000;

/// Of notes in shared memory the last ones, at most so many.
template <class Note>
std::vector<Note> last_of(const void* place, uint64_t count, uint64_t most) {
    const auto* all = static_cast<const Note*>(place);
    return {all + (count > most ? count - most : 0), all + count};
}

}  // namespace

DeviceMemory::DeviceMemory(uint64_t bytes) {
    require(cudaMalloc(&start_, bytes), "memory of the emulated NICs");
    require(cudaMemset(start_, 0, bytes), "memory of the emulated NICs");
}

DeviceMemory::~DeviceMemory() { cudaFree(start_); }

void EmulatedGpu::add_region(const Region& region) {
    if (region.memory != Memory::kCuda || (device_ >= 0 && region.device != device_)) {
        throw std::runtime_error("transport " + name_ + ": region " + std::to_string(region.id) +
                                 " must be memory of one and the same GPU");
    }
    device_ = region.device;
    require(cudaSetDevice(device_), "cudaSetDevice");
    mine_.regions[region.id] = carrier::export_memory(region.pointer, region.bytes);
    mine_.region_addresses[region.id] = reinterpret_cast<uint64_t>(region.pointer);
}

void EmulatedGpu::open(const Plan& plan) {
    plan_ = plan;
    options_ = emulated::parse_options(plan.options, uint32_t(plan.num_nodes));
    require_range("planes", options_.num_planes, 1, carrier::kMaxPlanes);
    require_range("blocks", options_.num_blocks, 1, 64);
    check(options_);
    const uint64_t bytes = mine_.regions[EPCOMM_FABRIC_SIGNALS].bytes;
    const uint64_t signals = by_host_ ? bytes / sizeof(uint64_t) : signals_in(bytes);
    shape_ = {plan.num_nodes,   plan.node,        plan.num_channels, int32_t(options_.num_planes),
              int32_t(signals), by_host_ ? 1 : 0, plan.max_messages};
    arena_ = std::make_unique<DeviceMemory>(places().bytes);
    shared_ = std::make_unique<carrier::SharedMemory>(NicShared(shape_).bytes);
    nics_.resize(size_t(shape_.num_planes));
    for (Nic& nic : nics_) nic.line = options_.line;
    register_regions();
    carrier::for_each_queue(shape_, [this](int32_t, int32_t, int32_t, int32_t plane, uint32_t) {
        if (emulated::add_queue(&nics_[size_t(plane)], 1) != 0) return;
        throw std::runtime_error("transport " + name_ + ": an NIC has at most " +
                                 std::to_string(emulated::kMaxQueues) +
                                 " queue pairs, one for each peer and channel");
    });
    mine_.pid = int32_t(getpid());
    mine_.node = plan.node;
    mine_.shape = shape_;
    require(cudaDeviceGetPCIBusId(mine_.gpu, sizeof mine_.gpu, device_), "cudaDeviceGetPCIBusId");
    mine_.ahead_ns = emulated::device_ahead_ns();
    mine_.opened_ns = now_ns();
    mine_.arena = carrier::export_memory(arena_->start(), places().bytes);
    mine_.arena_address = reinterpret_cast<uint64_t>(arena_->start());
    peers_.resize(size_t(plan.num_nodes));
}

std::string EmulatedGpu::address(int32_t peer) {
    NicAddress theirs = mine_;
    carrier::for_each_queue(shape_,
                            [&](int32_t, int32_t to, int32_t channel, int32_t, uint32_t number) {
                                if (to == peer) theirs.numbers[channel] = number;
                            });
    return bytes_of(theirs);
}

void EmulatedGpu::connect(const std::vector<std::string>& addresses) {
    require(cudaSetDevice(device_), "cudaSetDevice");
    std::vector<NicAddress> all(size_t(plan_.num_nodes), mine_);
    for (int32_t n = 0; n < plan_.num_nodes; ++n) {
        if (n != plan_.node) all[size_t(n)] = checked(n, addresses[size_t(n)]);
        if (n != plan_.node) peers_[size_t(n)].watch(all[size_t(n)].pid);
    }
    set_up(fill_tables(all));
    // Last: from now on peers find the queue pairs ready.
    upload(places().nics, nics_);
    require(cudaDeviceSynchronize(), "filling the memory of the emulated NICs");
    start_carrier(all);
}

void EmulatedGpu::ask(carrier::NicQuestion question) const {
    NicReport* report = said();
    report->question = question;
    const uint64_t asked = report->asked + 1;
    store_release(&report->asked, asked);
    const int64_t until = now_ns() + kAnswerNs;
    while (load_acquire(&report->answered) != asked) {
        if (now_ns() > until) throw std::runtime_error("the emulated NICs do not answer");
        usleep(200);
    }
}

bool EmulatedGpu::count(epcomm_fabric_traffic* into, bool restart) {
    const std::lock_guard<std::mutex> lock(asking_);
    ask(restart ? carrier::kCountAnew : carrier::kCount);
    // On the host's clock, so that ranks with other GPUs can be compared.
    emulated::fill_counts(said()->traffic, options_.line, host_epoch_ns_, into);
    into->num_nics = shape_.num_planes;
    return true;
}

bool EmulatedGpu::keep_messages(uint64_t capacity) {
    if (capacity > uint64_t(shape_.max_messages)) return false;
    const std::lock_guard<std::mutex> lock(asking_);
    ask(carrier::kForgetMessages);
    kept_messages_ = capacity;
    return true;
}

std::vector<epcomm_fabric_message> EmulatedGpu::messages(uint64_t* total) {
    const std::lock_guard<std::mutex> lock(asking_);
    ask(carrier::kTellMessages);
    const NicReport* report = said();
    const uint8_t* place =
        static_cast<const uint8_t*>(shared_->start()) + NicShared(shape_).messages;
    std::vector<epcomm_fabric_message> all;
    for (const auto& kept :
         last_of<emulated::Passage>(place, report->num_messages, kept_messages_)) {
        all.push_back(emulated::message_of(kept, epoch_ns_));
        name_lane(kept.nic, &all.back());
    }
    *total = report->total_messages;
    return all;
}

std::vector<epcomm_fabric_event> EmulatedGpu::events(uint64_t* total) {
    const std::lock_guard<std::mutex> lock(asking_);
    ask(carrier::kTellEvents);
    const NicReport* report = said();
    const uint8_t* place = static_cast<const uint8_t*>(shared_->start()) + NicShared(shape_).events;
    std::vector<epcomm_fabric_event> all;
    for (const auto& kept : last_of<emulated::Event>(place, report->num_events, kept_messages_)) {
        all.push_back(emulated::event_of(kept, epoch_ns_));
        name_lane(kept.nic, &all.back());
    }
    *total = report->total_events;
    return all;
}

template <class Told>
void EmulatedGpu::name_lane(uint32_t nic, Told* told) const {
    told->plane = plane_of(nic);
    const Lane lane = lane_of(told->plane, told->queue_pair);
    told->peer = lane.peer;
    told->channel = lane.channel;
}

Lane EmulatedGpu::lane_of(int32_t plane, uint32_t number) const {
    Lane lane = {-1, -1};
    carrier::for_each_queue(
        shape_, [&](int32_t, int32_t peer, int32_t channel, int32_t of_plane, uint32_t of_number) {
            if (of_plane == plane && of_number == number) lane = {peer, channel};
        });
    return lane;
}

emulated::BrokenRules EmulatedGpu::broken_rules() const {
    const emulated::BrokenRules& seen = said()->broken_rules;
    const uint64_t count = load_acquire(&seen.count);
    return count == 0 ? emulated::BrokenRules() : emulated::BrokenRules{count, seen.first};
}

void EmulatedGpu::look_for_broken_rules() {
    const emulated::BrokenRules found = broken_rules();
    if (found.count == 0) return;
    const emulated::Event& first = found.first;
    report(plan_.state, error_of(found, lane_of(plane_of(first.nic), first.queue)));
}

std::string EmulatedGpu::error_text(const Completion& completion) const {
    emulated::BrokenRules found;
    if (emulated::is_malformed(completion.vendor)) {
        const std::lock_guard<std::mutex> lock(asking_);
        try {
            ask(carrier::kTellBrokenRules);
            found = broken_rules();
        } catch (const std::runtime_error&) {
            // It does not answer. Then the rule has no name, and the error still comes.
        }
    }
    return describe_error(completion, found);
}

/// Of one plane.
int64_t EmulatedGpu::memory_bytes(int32_t num_nodes, int32_t num_channels,
                                  int32_t num_signals) const {
    const carrier::NicShape shape = {num_nodes,        0, num_channels, 1, num_signals,
                                     by_host_ ? 1 : 0, 0};
    return int64_t(NicArena(shape).bytes + NicShared(shape).bytes);
}

void EmulatedGpu::close() {
    carrier_.reset();
    shared_.reset();
    arena_.reset();
    peers_.clear();
}

std::string EmulatedGpu::why_dead() {
    if (carrier_->gone()) {
        return "the carrier, the process of this rank's emulated NICs, is gone: " +
               carrier_->last_words();
    }
    const uint64_t beat = load_acquire(&said()->heartbeat_ns);
    const int64_t now = now_ns();
    if (beat != beat_) {
        beat_ = beat;
        beat_at_ns_ = now;
    }
    return now - beat_at_ns_ > kStallNs ? "the emulated NICs' kernel gives no sign of life" : "";
}

Ibgda EmulatedGpu::fabric() const {
    Ibgda fabric{};
    fabric.state = plan_.state;
    fabric.timeout_ns = plan_.timeout_ns;
    fabric.num_channels = shape_.num_channels;
    fabric.num_nodes = shape_.num_nodes;
    fabric.num_planes = shape_.num_planes;
    fabric.num_signals = shape_.num_signals;
    fabric.failover = options_.failover;
    fabric.node = shape_.node;
    return fabric;
}

void EmulatedGpu::require_range(const char* option, uint64_t value, uint64_t least,
                                uint64_t most) const {
    if (value >= least && value <= most) return;
    throw std::runtime_error("transport " + name_ + ": " + option + ": expected " +
                             std::to_string(least) + " to " + std::to_string(most) + ", got " +
                             std::to_string(value));
}

std::string EmulatedGpu::network() const {
    return "modelled network of " + std::to_string(options_.num_planes) + " x " +
           std::to_string(options_.line.bytes_per_ns) + " GB/s and " +
           std::to_string(options_.line.latency_ns) + " ns, served by " +
           std::to_string(options_.num_blocks) + " SMs by process " +
           std::to_string(carrier_ == nullptr ? 0 : carrier_->pid());
}

void EmulatedGpu::upload(uint64_t offset, const void* from, uint64_t bytes) const {
    require(cudaMemcpy(at(offset), from, bytes, cudaMemcpyHostToDevice),
            "filling the memory of the emulated NICs");
}

void EmulatedGpu::register_regions() {
    for (int32_t plane = 0; plane < shape_.num_planes; ++plane) {
        for (int id = 0; id < EPCOMM_FABRIC_MAX_REGIONS; ++id) {
            const uint64_t bytes = mine_.regions[id].bytes, at = mine_.region_addresses[id];
            if (bytes == 0) continue;
            // Atomics bring old values to any of them.
            uint32_t access = emulated::kRemoteWrite | emulated::kLocalWrite;
            // Who moves a lane off a dead plane reads the peer's counters.
            if (id == EPCOMM_FABRIC_SIGNALS) {
                access |= emulated::kRemoteRead | emulated::kRemoteAtomic;
            }
            const uint32_t key = emulated::add_key(&nics_[size_t(plane)], {at, bytes, 1, access});
            mine_.keys[plane][id] = {at, bytes, key};
        }
    }
}

NicAddress EmulatedGpu::checked(int32_t node, const std::string& bytes) const {
    NicAddress theirs;
    bool fits = bytes.size() == sizeof theirs;
    if (fits) {
        memcpy(&theirs, bytes.data(), sizeof theirs);
        fits = theirs.shape.num_planes == shape_.num_planes &&
               theirs.shape.num_channels == shape_.num_channels &&
               theirs.shape.num_signals == shape_.num_signals &&
               theirs.shape.by_host == shape_.by_host;
    }
    if (fits) return theirs;
    throw std::runtime_error("transport " + name_ + ": node " + std::to_string(node) +
                             " uses another transport, version or number of planes");
}

/// Connects the queue pairs, too.
EmulatedGpu::Tables EmulatedGpu::fill_tables(const std::vector<NicAddress>& all) {
    Tables tables;
    tables.queues.resize(size_t(shape_.num_queues()));
    carrier::for_each_queue(
        shape_, [&](int32_t index, int32_t peer, int32_t channel, int32_t plane, uint32_t number) {
            mlx5::SendQueue& queue = tables.queues[size_t(index)];
            place(index, &queue);
            queue.number = number;
            mlx5::start_at(&queue, 0);
            emulated::QueueEntry* entry = find_queue(nics_[size_t(plane)], number);
            entry->peer_nic = shape_.nic(peer, plane);
            entry->peer_number = all[size_t(peer)].numbers[channel];
            entry->state = emulated::kReady;
        });
    for (int32_t n = 0; n < shape_.num_nodes; ++n) {
        for (int32_t plane = 0; plane < shape_.num_planes; ++plane) {
            const RegionKey* keys = all[size_t(n)].keys[plane];
            tables.remote.insert(tables.remote.end(), keys, keys + EPCOMM_FABRIC_MAX_REGIONS);
            if (n != shape_.node) continue;
            tables.local.insert(tables.local.end(), keys, keys + EPCOMM_FABRIC_MAX_REGIONS);
        }
    }
    return tables;
}

void EmulatedGpu::start_carrier(const std::vector<NicAddress>& all) {
    NicSetup setup{};
    setup.shape = shape_;
    setup.device = device_;
    setup.num_blocks = int32_t(options_.num_blocks);
    setup.num_rules = int32_t(options_.rules.size());
    // Time 0 is a little in the past, because 0 stands for "not yet" in places. All that share a
    // GPU say the same of its timer.
    host_epoch_ns_ = all[0].opened_ns - 1'000'000;
    const auto same = std::find_if(all.begin(), all.end(), [this](const NicAddress& one) {
        return memcmp(one.gpu, mine_.gpu, sizeof one.gpu) == 0;
    });
    setup.epoch_ns = epoch_ns_ = host_epoch_ns_ + same->ahead_ns;
    setup.seed = options_.seed;
    std::string bytes = bytes_of(setup);
    bytes.append(reinterpret_cast<const char*>(options_.rules.data()),
                 options_.rules.size() * sizeof(emulated::FaultRule));
    bytes.append(reinterpret_cast<const char*>(all.data()), all.size() * sizeof(NicAddress));
    carrier_ = std::make_unique<carrier::Carrier>("nic", bytes, std::vector<int>{shared_->fd()});
    beat_at_ns_ = now_ns();
}

}  // namespace epcomm::fabric
