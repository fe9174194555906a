// The transport over libibverbs: reliable connections on InfiniBand or RoCE.
//
// One queue pair per (peer, channel). Channels are dealt over the rank's network cards; a lane has
// a completion queue per card, so lanes share nothing and need no lock.

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <deque>
#include <map>
#include <mutex>
#include <stdexcept>

#include "../transport.h"
#include "cuda_driver.h"
#include "queue_pair.h"

namespace epcomm::fabric {

namespace {

constexpr uint32_t kMagic = 0x76726273;

/// What a rank tells a peer: this, then an Endpoint per channel, then for each card a RemoteRegion
/// per region.
struct AddressHeader {
    uint32_t magic;
    uint32_t num_channels;
    uint32_t num_nics;
    uint32_t notices;  ///< this side cannot do without
};

using RegionTable = std::vector<RemoteRegion>;

struct PeerAddress {
    AddressHeader header;
    std::vector<Endpoint> endpoints;
    std::vector<RegionTable> regions;  ///< by card
};

PeerAddress read_address(const std::string& text, size_t node, int32_t num_channels) {
    PeerAddress address;
    AddressReader reader(text, node);
    reader.read(&address.header);
    if (address.header.magic != kMagic || int32_t(address.header.num_channels) != num_channels) {
        throw std::runtime_error("node " + std::to_string(node) +
                                 " has another transport or another number of channels");
    }
    address.endpoints.resize(address.header.num_channels);
    for (Endpoint& endpoint : address.endpoints) reader.read(&endpoint);
    address.regions.assign(address.header.num_nics, RegionTable(EPCOMM_FABRIC_MAX_REGIONS));
    for (RegionTable& table : address.regions) {
        for (RemoteRegion& region : table) reader.read(&region);
    }
    return address;
}

/// Memory for all queue pairs of one card.
struct Block {
    uint8_t* start = nullptr;
    uint64_t bytes = 0;
    ibv::Mr* key = nullptr;
};

/// What one proxy thread touches.
struct VerbsLane {
    std::vector<ibv::Cq*> queues;  ///< by card
    std::vector<QueuePair*> batch;
    std::deque<Completion> ready;
    std::vector<uint64_t> tokens;
    int32_t under_way = 0;
};

class Verbs : public Transport, private Receiver {
 public:
    ~Verbs() override { close(); }

    void add_region(const Region& region) override { wanted_.push_back(region); }
    void open(const Plan& plan) override;
    std::string address(int32_t peer) override;
    void connect(const std::vector<std::string>& addresses) override;
    size_t post(int32_t lane, const Operation* operations, size_t count) override;
    size_t poll(int32_t lane, Completion* completions, size_t capacity) override;
    // Somebody must be awake to raise the counters that the cards do not raise.
    int64_t longest_nap_ns() const override {
        return notices_ ? 200'000 : Transport::longest_nap_ns();
    }
    std::string error_text(const Completion& completion) const override;
    std::string describe() const override;
    void close() override;

 private:
    void open_nics();
    void register_regions();
    void make_lanes();
    void make_blocks();
    void make_queue_pairs();
    void decide_notices();
    uint32_t nic_of(int32_t channel) const { return uint32_t(size_t(channel) % nics_.size()); }
    int32_t depth() const;
    QueuePair* pair(int32_t peer, int32_t channel) const {
        return pairs_[size_t(peer) * size_t(plan_.num_channels) + size_t(channel)].get();
    }
    const RegisteredRegion* region(int32_t id) const {
        return id >= 0 && size_t(id) < regions_.size() && regions_[size_t(id)].wire != nullptr
                   ? &regions_[size_t(id)]
                   : nullptr;
    }
    void send_batch(VerbsLane* lane);
    void handle(VerbsLane* lane, const ibv::Wc& completion);
    void fail(VerbsLane* lane, uint64_t token, const Failure& failure);
    void arrived(const Notice& notice) override;

    Plan plan_{};
    VerbsOptions options_;
    std::vector<Region> wanted_;
    std::vector<Nic> nics_;
    std::vector<RegisteredRegion> regions_;  ///< by id
    std::vector<Block> blocks_;              ///< by card
    std::vector<VerbsLane> lanes_;
    std::vector<std::unique_ptr<QueuePair>> pairs_;  ///< by peer and channel
    std::string why_notices_;                        ///< empty: atomics will do
    bool notices_ = false;                           ///< with any peer
    mutable std::mutex failures_mutex_;
    std::map<uint64_t, std::string> failures_;  ///< by token
};

// ---- Opening

void Verbs::open(const Plan& plan) {
    plan_ = plan;
    options_ = parse_verbs_options(plan.options);
    open_nics();
    register_regions();
    decide_notices();
    make_lanes();
    make_blocks();
    make_queue_pairs();
}

void Verbs::open_nics() {
    if (options_.pci.empty()) options_.pci = gpu_of(wanted_);
    const auto names = choose_nics(sysfs(), list_devices(), options_);
    // Queue pairs keep references to what is in here.
    nics_.reserve(names.size());
    for (const NicName& name : names) nics_.push_back(open_nic(name, options_));
}

void Verbs::register_regions() {
    const bool atomics =
        std::all_of(nics_.begin(), nics_.end(), [](const Nic& nic) { return nic.atomics(); });
    regions_.resize(EPCOMM_FABRIC_MAX_REGIONS);
    for (const Region& region : wanted_) {
        Registration way = options_.registration;
        // Without atomics the proxy raises the counters, and it can do so after the bytes that a
        // card writes into a GPU directly only if they come through its hands too.
        const bool by_proxy = !atomics || options_.signal == SignalBy::kImmediate;
        if (region.memory == Memory::kCuda && by_proxy) way = Registration::kBounce;
        regions_[size_t(region.id)] = register_region(region, nics_, way);
        RegisteredRegion& registered = regions_[size_t(region.id)];
        // The counters' values are kept in the mirror.
        if (region.id == EPCOMM_FABRIC_SIGNALS && registered.mirror != nullptr &&
            !registered.mirror->fetch(0, region.bytes)) {
            throw std::runtime_error("the signals cannot be copied from the GPU");
        }
    }
}

void Verbs::decide_notices() {
    for (const Nic& nic : nics_) {
        if (!nic.atomics()) why_notices_ = nic.name.device + " has no atomics";
    }
    for (const RegisteredRegion& region : regions_) {
        if (region.mirror != nullptr) {
            why_notices_ = "memory is reached through a copy: " + region.report;
        }
    }
    if (options_.signal == SignalBy::kAtomic && !why_notices_.empty()) {
        throw std::runtime_error("option signal: atomic is not possible, " + why_notices_);
    }
    if (options_.signal == SignalBy::kImmediate) why_notices_ = "asked for";
}

int32_t Verbs::depth() const {
    int32_t most = std::min(options_.depth, plan_.max_in_flight);
    for (const Nic& nic : nics_) most = std::min(most, nic.device.max_qp_wr / 2 - 8);
    return std::max(most, 1);
}

void Verbs::make_lanes() {
    lanes_.resize(size_t(plan_.num_lanes));
    // Every request may complete, also those that asked for no completion, when a queue pair fails.
    const int64_t receives = int64_t(plan_.num_nodes) * plan_.num_channels * (depth() + 8);
    for (VerbsLane& lane : lanes_) {
        for (const Nic& nic : nics_) {
            const int64_t entries =
                std::min<int64_t>(2 * int64_t(plan_.max_in_flight) + receives, nic.device.max_cqe);
            ibv::Cq* queue =
                ibv::library().create_cq(nic.context, int(entries), nullptr, nullptr, 0);
            if (queue == nullptr) {
                throw std::runtime_error(nic.name.device + " cannot make a completion queue of " +
                                         std::to_string(entries) + " entries: " + strerror(errno));
            }
            lane.queues.push_back(queue);
        }
    }
}

void Verbs::make_blocks() {
    const uint64_t pairs = uint64_t(plan_.num_nodes) * uint64_t(plan_.num_channels);
    for (const Nic& nic : nics_) {
        Block block;
        block.bytes = pairs * QueuePair::memory_bytes(depth());
        void* memory =
            mmap(nullptr, block.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) {
            throw std::runtime_error("no memory for " + std::to_string(pairs) + " queue pairs");
        }
        block.start = static_cast<uint8_t*>(memory);
        blocks_.push_back(block);
        blocks_.back().key = register_host_memory(nic, block.start, block.bytes);
    }
}

void Verbs::make_queue_pairs() {
    pairs_.resize(size_t(plan_.num_nodes) * size_t(plan_.num_channels));
    for (size_t index = 0; index < pairs_.size(); ++index) {
        QueuePairPlan plan{};
        plan.peer = int32_t(index / size_t(plan_.num_channels));
        plan.channel = int32_t(index % size_t(plan_.num_channels));
        if (plan.peer == plan_.node) continue;
        plan.index = uint32_t(index);
        plan.nic = nic_of(plan.channel);
        plan.depth = depth();
        const Block& block = blocks_[plan.nic];
        pairs_[index] = std::make_unique<QueuePair>(
            nics_[plan.nic], lanes_[size_t(plan_.lane_of(plan.channel))].queues[plan.nic],
            QueueMemory{block.start + index * QueuePair::memory_bytes(plan.depth), block.key}, plan,
            options_);
    }
}

std::string Verbs::address(int32_t peer) {
    std::string text;
    append_bytes(&text, AddressHeader{kMagic, uint32_t(plan_.num_channels), uint32_t(nics_.size()),
                                      uint32_t(!why_notices_.empty())});
    for (int32_t channel = 0; channel < plan_.num_channels; ++channel) {
        append_bytes(&text, pair(peer, channel)->endpoint());
    }
    for (size_t nic = 0; nic < nics_.size(); ++nic) {
        for (const RegisteredRegion& region : regions_) {
            RemoteRegion remote{};
            if (region.wire != nullptr) {
                remote = {reinterpret_cast<uint64_t>(region.wire),
                          region.region.bytes,
                          region.keys[nic]->rkey,
                          1,
                          region.mirror != nullptr,
                          {}};
            }
            append_bytes(&text, remote);
        }
    }
    return text;
}

void Verbs::connect(const std::vector<std::string>& addresses) {
    for (int32_t peer = 0; peer < plan_.num_nodes; ++peer) {
        if (peer == plan_.node) continue;
        const PeerAddress remote =
            read_address(addresses[size_t(peer)], size_t(peer), plan_.num_channels);
        const bool notices = !why_notices_.empty() || remote.header.notices != 0;
        const RegisteredRegion* signals = region(EPCOMM_FABRIC_SIGNALS);
        if (notices && signals != nullptr && signals->region.memory == Memory::kCuda &&
            signals->mirror == nullptr) {
            throw std::runtime_error("node " + std::to_string(peer) +
                                     " cannot raise signals in a GPU's memory (no atomics); give "
                                     "every rank the option signal=immediate");
        }
        notices_ = notices_ || notices;
        for (int32_t channel = 0; channel < plan_.num_channels; ++channel) {
            const Endpoint& endpoint = remote.endpoints[size_t(channel)];
            pair(peer, channel)->connect(endpoint, remote.regions.at(endpoint.nic), notices);
        }
    }
}

// ---- The data path

void Verbs::fail(VerbsLane* lane, uint64_t token, const Failure& failure) {
    {
        const std::lock_guard<std::mutex> lock(failures_mutex_);
        failures_[token] = fabric::describe(failure, options_);
    }
    lane->ready.push_back({token, false, int32_t(failure.status), failure.queue_pair});
}

void Verbs::send_batch(VerbsLane* lane) {
    for (QueuePair* pair : lane->batch) {
        Failure failure;
        uint64_t token = 0;
        if (!pair->send(&failure, &token)) fail(lane, token, failure);
    }
    lane->batch.clear();
}

size_t Verbs::post(int32_t number, const Operation* operations, size_t count) {
    VerbsLane& lane = lanes_[size_t(number)];
    size_t accepted = 0;
    for (; accepted < count && lane.under_way < plan_.max_in_flight; ++accepted) {
        const Operation& operation = operations[accepted];
        QueuePair* to = pair(operation.command.peer, operation.command.channel);
        if (to->full()) break;
        ++lane.under_way;
        Failure failure;
        if (!to->append(operation, region(operation.command.local.region), &failure)) {
            fail(&lane, operation.token, failure);
            ++accepted;
            break;
        }
        if (std::find(lane.batch.begin(), lane.batch.end(), to) == lane.batch.end()) {
            lane.batch.push_back(to);
        }
    }
    send_batch(&lane);
    return accepted;
}

void Verbs::handle(VerbsLane* lane, const ibv::Wc& completion) {
    QueuePair* from = pairs_[QueuePair::index_of(completion)].get();
    if (QueuePair::is_receive(completion)) {
        from->receive(completion, this);
        return;
    }
    Failure failure;
    const bool ok = from->finish(completion, &lane->tokens, &failure);
    for (size_t i = 0; i < lane->tokens.size(); ++i) {
        const uint64_t token = lane->tokens[i];
        if (ok || i + 1 < lane->tokens.size())
            lane->ready.push_back({token, true, 0, 0});
        else
            fail(lane, token, failure);
    }
    lane->tokens.clear();
}

size_t Verbs::poll(int32_t number, Completion* completions, size_t capacity) {
    VerbsLane& lane = lanes_[size_t(number)];
    constexpr int kBatch = 32;
    ibv::Wc found[kBatch];
    for (ibv::Cq* queue : lane.queues) {
        if (lane.ready.size() >= capacity) break;
        const int count = queue->context->ops.poll_cq(queue, kBatch, found);
        for (int i = 0; i < count; ++i) handle(&lane, found[i]);
    }
    size_t handed = 0;
    for (; handed < capacity && !lane.ready.empty(); ++handed) {
        completions[handed] = lane.ready.front();
        lane.ready.pop_front();
        --lane.under_way;
    }
    return handed;
}

void Verbs::arrived(const Notice& notice) {
    // A peer's mistake must not become a write outside of a region.
    const RegisteredRegion* to = region(int32_t(notice.region));
    if (notice.bytes > 0 && to != nullptr && to->mirror != nullptr &&
        notice.offset <= to->region.bytes && notice.bytes <= to->region.bytes - notice.offset) {
        to->mirror->store(notice.offset, notice.bytes);
    }
    const RegisteredRegion* signals = region(EPCOMM_FABRIC_SIGNALS);
    const uint64_t place = uint64_t(notice.signal) * sizeof(uint64_t);
    if (notice.value == 0 || signals == nullptr || place >= signals->region.bytes) return;
    auto* word = reinterpret_cast<uint64_t*>(signals->wire + place);
    // Only this lane raises this counter; whoever sees its value sees the bytes before it.
    const uint64_t value = __atomic_add_fetch(word, notice.value, __ATOMIC_RELEASE);
    if (signals->mirror != nullptr) signals->mirror->store_word(place, value);
}

std::string Verbs::error_text(const Completion& completion) const {
    const std::lock_guard<std::mutex> lock(failures_mutex_);
    const auto found = failures_.find(completion.token);
    return found != failures_.end() ? found->second : "verbs: an operation failed";
}

std::string Verbs::describe() const {
    std::string text = "verbs:";
    for (const Nic& nic : nics_) text += " " + fabric::describe(nic) + ",";
    text += " sl " + std::to_string(options_.service_level) + " tc " +
            std::to_string(options_.traffic_class) + ", signals by " +
            (notices_ ? "notices (" + (why_notices_.empty() ? "a peer's need" : why_notices_) + ")"
                      : "fetch-add") +
            ", memory:" + reports_of(regions_);
    return text;
}

// ---- Closing

void Verbs::close() {
    // Queue pairs first: after that no card touches anything of this rank's.
    pairs_.clear();
    for (VerbsLane& lane : lanes_) {
        for (ibv::Cq* queue : lane.queues) ibv::library().destroy_cq(queue);
    }
    lanes_.clear();
    for (RegisteredRegion& region : regions_) unregister_region(&region);
    regions_.clear();
    for (Block& block : blocks_) {
        if (block.key != nullptr) ibv::library().dereg_mr(block.key);
        munmap(block.start, block.bytes);
    }
    blocks_.clear();
    for (Nic& nic : nics_) close_nic(&nic);
    nics_.clear();
}

const RegisterTransport registered("verbs", [] {
    return std::unique_ptr<Transport>(std::make_unique<Verbs>());
});

}  // namespace

}  // namespace epcomm::fabric
