// The transport `local` for host memory: ranks of virtual nodes on one machine.
//
// A region is a mapping of a memfd, which peers open through /proc and map too. A put is a copy by
// the proxy thread, a signal an addition with release order after it.

#include <string.h>

#include <algorithm>
#include <stdexcept>

#include "atomics.h"
#include "peer_memory.h"
#include "peer_process.h"
#include "plain_address.h"
#include "transport.h"

namespace epcomm::fabric {

namespace {

/// What a peer is told: who to look for, and one entry per region.
struct Address {
    int32_t pid;
    int32_t node;
    struct Entry {
        int32_t registered;
        MemoryFile file;
    } regions[EPCOMM_FABRIC_MAX_REGIONS];
};

class Local : public Transport {
 public:
    ~Local() override { close(); }

    void add_region(const Region& region) override {
        if (region.memory != Memory::kHost || region.fd < 0) {
            throw std::runtime_error("transport local: region " + std::to_string(region.id) +
                                     " must be host memory that maps a memfd");
        }
        mine_.regions[region.id] = {1, memory_file(region.fd, region.fd_offset, region.bytes)};
        local_[region.id] = static_cast<uint8_t*>(region.pointer);
    }

    void open(const Plan& plan) override {
        plan_ = plan;
        mine_.pid = int32_t(getpid());
        mine_.node = plan.node;
        peers_.resize(size_t(plan.num_nodes));
        lanes_.resize(size_t(plan.num_lanes));
    }

    std::string address(int32_t) override { return bytes_of(mine_); }

    void connect(const std::vector<std::string>& addresses) override {
        for (int32_t n = 0; n < plan_.num_nodes; ++n) {
            if (n != plan_.node) map_peer(n, addresses[size_t(n)]);
        }
    }

    size_t post(int32_t lane, const Operation* operations, size_t count) override {
        std::vector<Completion>& completed = lanes_[size_t(lane)].completed;
        for (size_t i = 0; i < count; ++i) {
            const int32_t failure = carry_out(operations[i].command);
            completed.push_back({operations[i].token, failure == 0, failure, 0});
        }
        return count;
    }

    size_t poll(int32_t lane, Completion* completions, size_t capacity) override {
        Lane& from = lanes_[size_t(lane)];
        const size_t count = std::min(capacity, from.completed.size() - from.collected);
        std::copy_n(from.completed.begin() + ptrdiff_t(from.collected), count, completions);
        from.collected += count;
        if (from.collected == from.completed.size()) {
            from.completed.clear();
            from.collected = 0;
        }
        return count;
    }

    bool peer_gone(int32_t node) override { return peers_[size_t(node)].process.gone(); }

    std::string error_text(const Completion& completion) const override {
        if (completion.vendor == kPeerGone) return "the peer's process is gone";
        return "the place at the peer is not in a region it registered";
    }

    std::string describe() const override {
        return "local: shared memory, copied by " + std::to_string(plan_.num_lanes) +
               " proxy thread(s)";
    }

    void close() override { peers_.clear(); }

 private:
    struct Peer {
        PeerProcess process;
        PeerMemory regions[EPCOMM_FABRIC_MAX_REGIONS];
    };
    struct Lane {
        std::vector<Completion> completed;
        size_t collected = 0;
    };

    void map_peer(int32_t node, const std::string& bytes) {
        const auto address = address_of<Address>(bytes, "local", node);
        Peer& peer = peers_[size_t(node)];
        peer.process.watch(address.pid);
        for (int id = 0; id < EPCOMM_FABRIC_MAX_REGIONS; ++id) {
            if (address.regions[id].registered != 0) {
                peer.regions[id].map(address.regions[id].file, "node " + std::to_string(node));
            }
        }
    }

    int32_t carry_out(const Command& command) {
        if (peer_gone(command.peer)) return kPeerGone;
        Peer& peer = peers_[size_t(command.peer)];
        if (command.bytes != 0 && command.op != EPCOMM_FABRIC_SIGNAL_ADD) {
            const PeerMemory& remote = peer.regions[command.remote.region];
            if (command.remote.offset + command.bytes > remote.bytes()) return kOutOfRange;
            memcpy(remote.start() + command.remote.offset,
                   local_[command.local.region] + command.local.offset, command.bytes);
        }
        if (command.op == EPCOMM_FABRIC_PUT) return 0;
        const PeerMemory& signals = peer.regions[EPCOMM_FABRIC_SIGNALS];
        const uint64_t at = uint64_t(command.signal) * sizeof(uint64_t);
        if (at + sizeof(uint64_t) > signals.bytes()) return kOutOfRange;
        // memcpy may store past the caches, and such stores are not ordered by release alone.
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        __atomic_fetch_add(reinterpret_cast<uint64_t*>(signals.start() + at),
                           command.op == EPCOMM_FABRIC_PUT_SIGNAL ? 1 : command.value,
                           __ATOMIC_RELEASE);
        return 0;
    }

    Plan plan_{};
    Address mine_{};
    uint8_t* local_[EPCOMM_FABRIC_MAX_REGIONS] = {};
    std::vector<Peer> peers_;
    std::vector<Lane> lanes_;
};

const RegisterTransport kRegistered("local", []() -> std::unique_ptr<Transport> {
    return std::make_unique<Local>();
});

}  // namespace

}  // namespace epcomm::fabric
