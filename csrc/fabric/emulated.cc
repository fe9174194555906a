// The transport `emulated`: proxy threads write mlx5 requests, an emulated NIC carries them out.
//
// For host memory, on one machine. A rank has one NIC, in shared memory, which its peers' NICs see;
// all work on its queue pairs is done by its own proxy threads when they poll: what a rank sends
// needs nobody else. Requests, signals and errors are those of fabric/ibgda.h.
//
// Options: emulated/options.h, with one plane.

#include <algorithm>
#include <mutex>

#include "../emulated/counts.h"
#include "../emulated/engine.h"
#include "../emulated/options.h"
#include "nic_errors.h"
#include "peer_memory.h"
#include "peer_process.h"
#include "plain_address.h"
#include "posting.h"
#include "transport.h"

namespace epcomm::fabric {

namespace {

using emulated::Engine;

constexpr uint32_t kDepth = 256;  ///< blocks of a send queue

/// What a peer is told.
struct Address {
    int64_t epoch_ns;
    MemoryFile nic;
    struct Entry {
        MemoryFile file;
        RegionKey key;
    } regions[EPCOMM_FABRIC_MAX_REGIONS];
    uint32_t queue_pairs[EPCOMM_FABRIC_MAX_CHANNELS];  ///< for this peer, by channel
};

/// Memory of this rank that peers can map.
class SharedNic {
 public:
    SharedNic() {
        fd_ = memfd_create("epcomm-nic", MFD_CLOEXEC);
        if (fd_ < 0 || ftruncate(fd_, sizeof(emulated::Nic)) != 0) fail();
        void* base =
            mmap(nullptr, sizeof(emulated::Nic), PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
        if (base == MAP_FAILED) fail();
        nic_ = new (base) emulated::Nic();
    }
    SharedNic(const SharedNic&) = delete;
    SharedNic& operator=(const SharedNic&) = delete;
    ~SharedNic() {
        munmap(nic_, sizeof *nic_);
        close(fd_);
    }
    emulated::Nic* nic() { return nic_; }
    MemoryFile file() const { return memory_file(fd_, 0, sizeof(emulated::Nic)); }

 private:
    void fail() {
        const std::string why = system_text("transport emulated: memory of the NIC");
        if (fd_ >= 0) close(fd_);
        throw std::runtime_error(why);
    }

    int fd_ = -1;
    emulated::Nic* nic_ = nullptr;
};

/// The memory of one send queue.
struct Endpoint {
    std::vector<mlx5::Block> ring{kDepth};
    std::vector<mlx5::Completion> completions{kDepth};
    mlx5::Be32 record[mlx5::kRecordWords] = {};
    uint64_t doorbell = 0;
};

class Emulated : public Transport {
 public:
    void add_region(const Region& region) override {
        if (region.memory != Memory::kHost || region.fd < 0) {
            throw std::runtime_error("transport emulated: region " + std::to_string(region.id) +
                                     " must be host memory that maps a memfd");
        }
        mine_.regions[region.id] = {
            memory_file(region.fd, region.fd_offset, region.bytes),
            register_memory(region.pointer, region.bytes, emulated::kRemoteWrite)};
        local_[size_t(region.id)] = mine_.regions[region.id].key;
    }

    void open(const Plan& plan) override {
        plan_ = plan;
        const emulated::TransportOptions options =
            emulated::parse_options(plan.options, uint32_t(plan.num_nodes));
        if (options.num_planes != 1) {
            throw std::runtime_error("transport emulated: planes: expected 1, got " +
                                     std::to_string(options.num_planes));
        }
        nic_.nic()->line = options.line;
        mine_.nic = nic_.file();
        mine_.epoch_ns = now_ns();
        peers_.resize(size_t(plan.num_nodes));
        nics_.resize(size_t(plan.num_nodes), nic_.nic());
        shifts_.resize(size_t(plan.num_nodes) * emulated::kMaxKeys);
        remote_.resize(size_t(plan.num_nodes) * EPCOMM_FABRIC_MAX_REGIONS);
        wire_ = {mine_.epoch_ns, uint32_t(plan.num_nodes), nics_.data(), shifts_.data()};
        emulated::EngineOptions engine;
        engine.virtual_clock = false;
        engine.seed = options.seed;
        engine.rules = options.rules;
        engine_ = std::make_unique<Engine>(&wire_, std::move(engine));
        endpoints_.resize(size_t(plan.num_nodes * plan.num_channels));
        queues_.resize(endpoints_.size());
        for (int32_t peer = 0; peer < plan.num_nodes; ++peer) {
            for (int32_t channel = 0; peer != plan.node && channel < plan.num_channels; ++channel) {
                open_queue(peer, channel);
            }
        }
        fabric_.queues = queues_.data();
        fabric_.local = local_;
        fabric_.remote = remote_.data();
        fabric_.num_channels = plan.num_channels;
        fabric_.num_nodes = plan.num_nodes;
        fabric_.num_planes = 1;
        fabric_.node = plan.node;
        fabric_.num_signals = int32_t(local_[EPCOMM_FABRIC_SIGNALS].bytes / sizeof(uint64_t));
        raised_.resize(raised_bytes(plan.num_nodes, fabric_.num_signals) / sizeof(uint64_t));
        fabric_.raised = raised_.data();
        posting_ = std::make_unique<Posting>(plan, fabric_, nullptr);
    }

    std::string address(int32_t peer) override {
        for (int32_t channel = 0; peer != plan_.node && channel < plan_.num_channels; ++channel) {
            mine_.queue_pairs[channel] = queue_of(fabric_, {peer, channel})->number;
        }
        return bytes_of(mine_);
    }

    void connect(const std::vector<std::string>& addresses) override {
        epoch_ = mine_.epoch_ns;
        for (int32_t n = 0; n < plan_.num_nodes; ++n) {
            if (n != plan_.node) connect_peer(n, addresses[size_t(n)]);
        }
        // The machine's clock, from the same moment for all.
        wire_.epoch_ns = epoch_;
    }

    size_t post(int32_t lane, const Operation* operations, size_t count) override {
        return posting_->post(lane, operations, count);
    }

    size_t poll(int32_t lane, Completion* completions, size_t capacity) override {
        {
            // Whoever is not the one that works the NIC finds what the other has done.
            const std::unique_lock<std::mutex> lock(working_, std::try_to_lock);
            if (lock.owns_lock()) {
                if (++steps_ % 1024 == 0) look_for_dead_peers();
                engine_->step();
            }
        }
        return posting_->poll(lane, completions, capacity);
    }

    bool peer_gone(int32_t peer) override { return peers_[size_t(peer)].process.gone(); }

    /// Retries and lost doorbells are found by looking.
    int64_t longest_nap_ns() const override { return 1'000'000; }

    std::string error_text(const Completion& completion) const override {
        return describe_error(completion, engine_->broken_rules());
    }

    void look_after() override {
        const emulated::BrokenRules found = engine_->broken_rules();
        if (found.count == 0) return;
        report(plan_.state, error_of(found, lane_of(found.first.queue)));
    }

    std::string describe() const override {
        return "emulated: mlx5 requests, modelled network of " +
               std::to_string(wire_.nic(uint32_t(plan_.node)).line.bytes_per_ns) + " GB/s and " +
               std::to_string(wire_.nic(uint32_t(plan_.node)).line.latency_ns) + " ns";
    }

    bool count(epcomm_fabric_traffic* into, bool restart) override {
        const std::lock_guard<std::mutex> lock(working_);
        const auto node = uint32_t(plan_.node);
        const emulated::Traffic& seen = engine_->traffic(node);
        emulated::fill_counts(seen, nic_.nic()->line, epoch_, into);
        into->num_nics = 1;
        if (restart) engine_->restart_traffic(node);
        return true;
    }

    bool keep_messages(uint64_t capacity) override {
        const std::lock_guard<std::mutex> lock(working_);
        engine_->keep_passages(capacity);
        engine_->keep_events(capacity);
        return true;
    }

    std::vector<epcomm_fabric_message> messages(uint64_t* total) override {
        const std::lock_guard<std::mutex> lock(working_);
        std::vector<epcomm_fabric_message> all;
        for (const emulated::Passage& passage : engine_->passages().in_order()) {
            all.push_back(message_of(passage));
        }
        *total = engine_->passages().count;
        return all;
    }

    std::vector<epcomm_fabric_event> events(uint64_t* total) override {
        const std::lock_guard<std::mutex> lock(working_);
        std::vector<epcomm_fabric_event> all;
        for (const emulated::Event& event : engine_->newest_events(total)) {
            all.push_back(emulated::event_of(event, epoch_));
            const Lane lane = lane_of(event.queue);
            all.back().peer = lane.peer;
            all.back().channel = lane.channel;
        }
        return all;
    }

    int64_t memory_bytes(int32_t num_nodes, int32_t num_channels, int32_t) const override {
        const int64_t queue =
            sizeof(Endpoint) + kDepth * (sizeof(mlx5::Block) + sizeof(mlx5::Completion));
        return int64_t(sizeof(emulated::Nic)) + (num_nodes - 1) * num_channels * queue;
    }

    void close() override {
        engine_.reset();
        peers_.clear();
    }

 private:
    struct Peer {
        PeerProcess process;
        PeerMemory nic;
        PeerMemory regions[EPCOMM_FABRIC_MAX_REGIONS];
    };

    RegionKey register_memory(const void* start, uint64_t bytes, uint32_t access) {
        const auto address = reinterpret_cast<uint64_t>(start);
        return {address, bytes, emulated::add_key(nic_.nic(), {address, bytes, 1, access})};
    }

    void open_queue(int32_t peer, int32_t channel) {
        const auto index = size_t(peer * plan_.num_channels + channel);
        endpoints_[index] = std::make_unique<Endpoint>();
        Endpoint& memory = *endpoints_[index];
        for (auto& entry : memory.completions) entry.opcode_owner = mlx5::kInvalid << 4;
        mlx5::SendQueue& queue = queues_[index];
        queue.ring = memory.ring.data();
        queue.completions = memory.completions.data();
        queue.record = memory.record;
        queue.doorbell = &memory.doorbell;
        queue.num_blocks = queue.num_completions = kDepth;
        queue.number = engine_->add_queue(
            uint32_t(plan_.node),
            {queue.ring, queue.record, queue.doorbell, queue.completions, kDepth, kDepth});
        if (queue.number == 0) {
            throw std::runtime_error("transport emulated: an NIC has at most " +
                                     std::to_string(emulated::kMaxQueues) +
                                     " queue pairs, one for each peer and channel");
        }
        mlx5::start_at(&queue, 0);
    }

    void connect_peer(int32_t node, const std::string& bytes) {
        const auto theirs = address_of<Address>(bytes, "emulated", node);
        Peer& peer = peers_[size_t(node)];
        const std::string owner = "node " + std::to_string(node);
        peer.process.watch(theirs.nic.pid);
        peer.nic.map(theirs.nic, owner);
        nics_[size_t(node)] = reinterpret_cast<emulated::Nic*>(peer.nic.start());
        for (int id = 0; id < EPCOMM_FABRIC_MAX_REGIONS; ++id) {
            const RegionKey& key = theirs.regions[id].key;
            if (key.key == 0) continue;
            peer.regions[id].map(theirs.regions[id].file, owner);
            remote_[size_t(node * EPCOMM_FABRIC_MAX_REGIONS + id)] = key;
            shifts_[size_t(node) * emulated::kMaxKeys + key.key - emulated::kFirstKey] =
                int64_t(reinterpret_cast<uint64_t>(peer.regions[id].start()) - key.address);
        }
        if (node == 0) epoch_ = theirs.epoch_ns;
        for (int32_t channel = 0; channel < plan_.num_channels; ++channel) {
            engine_->connect(uint32_t(plan_.node), queue_of(fabric_, {node, channel})->number,
                             uint32_t(node), theirs.queue_pairs[channel]);
        }
    }

    Lane lane_of(uint32_t number) const {
        const auto found =
            std::find_if(queues_.begin(), queues_.end(), [&](const mlx5::SendQueue& queue) {
                return queue.ring != nullptr && queue.number == number;
            });
        const auto index = int32_t(found - queues_.begin());
        return {index / plan_.num_channels, index % plan_.num_channels};
    }

    epcomm_fabric_message message_of(const emulated::Passage& passage) const {
        epcomm_fabric_message message = emulated::message_of(passage, epoch_);
        const Lane lane = lane_of(passage.queue);
        message.peer = lane.peer;
        message.channel = lane.channel;
        return message;
    }

    /// A process that has ended does not answer; its memory would.
    void look_for_dead_peers() {
        for (size_t n = 0; n < peers_.size(); ++n) {
            if (peers_[n].process.gone()) store_release(&nics_[n]->dead, 1u);
        }
    }

    Plan plan_{};
    Address mine_{};
    SharedNic nic_;
    int64_t epoch_ = 0;
    emulated::Wire wire_{};
    std::vector<emulated::Nic*> nics_;
    std::vector<int64_t> shifts_;
    std::vector<Peer> peers_;
    std::unique_ptr<Engine> engine_;
    std::mutex working_;
    uint64_t steps_ = 0;
    std::vector<std::unique_ptr<Endpoint>> endpoints_;
    std::vector<mlx5::SendQueue> queues_;
    RegionKey local_[EPCOMM_FABRIC_MAX_REGIONS] = {};
    std::vector<RegionKey> remote_;
    std::vector<uint64_t> raised_;
    Ibgda fabric_{};
    std::unique_ptr<Posting> posting_;
};

const RegisterTransport kRegistered("emulated", []() -> std::unique_ptr<Transport> {
    return std::make_unique<Emulated>();
});

}  // namespace

}  // namespace epcomm::fabric
