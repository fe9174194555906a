// A network that delivers in every order the contract of transport.h allows, chosen by a seed.
//
// Allowed: bytes of a (source, peer, channel) land in pieces, in any order, late, again; bytes put
// after a signal land before it. Channels and peers overtake each other without bound. Not allowed,
// and on request done all the same, to see that it matters: `Fault`.
#pragma once

#include <stdlib.h>
#include <string.h>

#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "../../csrc/fabric/transport.h"

namespace chaos {

using namespace epcomm::fabric;

enum class Fault {
    kNone,
    kSignalBeforeData,  ///< a signal does not wait for the bytes before it
    kSignalTwice,       ///< a signal is applied again
    kDataAfterSignal,   ///< bytes land again after their signal
};

class Network {
 public:
    Network(int nodes, int channels, uint32_t seed, Fault fault)
        : random(seed), fault_(fault), nodes_(nodes), channels_(channels) {
        lanes_.resize(size_t(nodes * nodes * channels));
        // Some lanes are much slower than others, so that one is often far behind.
        for (Lane& lane : lanes_) lane.weight = 1u << random() % 10;
        regions_.resize(size_t(nodes));
        done_.resize(size_t(nodes * channels));
    }

    void add_region(int node, const Region& region) { regions_[size_t(node)].push_back(region); }

    void post(int source, const Operation& operation) {
        const Command& command = operation.command;
        Pending pending{operation, {}, {}};
        const uint8_t* from = bytes(source, command.local, command.bytes);
        for (uint64_t at = 0; at < command.bytes; at += EPCOMM_FABRIC_UNIT) {
            pending.pieces.push_back({at, 0});
        }
        pending.from = from;
        lane(source, command.peer, command.channel).pending.push_back(pending);
    }

    /// One delivery. False if none is possible.
    bool step() {
        uint64_t total = 0;
        for (const Lane& lane : lanes_) total += lane.busy() ? lane.weight : 0;
        if (total == 0) return false;
        uint64_t pick = random() % total;
        for (size_t i = 0; i < lanes_.size(); ++i) {
            if (!lanes_[i].busy()) continue;
            if (pick < lanes_[i].weight) {
                deliver(lanes_[i], int(i) / channels_ % nodes_, int(i) / channels_ / nodes_);
                return true;
            }
            pick -= lanes_[i].weight;
        }
        return false;
    }

    /// Tokens of what a node's channel has completed.
    std::vector<uint64_t>& done(int node, int channel) {
        return done_[size_t(node * channels_ + channel)];
    }

    std::mt19937 random;

 private:
    struct Piece {
        uint64_t at;
        int landed;
    };
    struct Pending {
        Operation operation;
        std::vector<Piece> pieces;
        const uint8_t* from;
    };
    /// Bytes as they were, to land once more when they should not.
    struct Echo {
        uint8_t* to;
        uint8_t bytes[EPCOMM_FABRIC_UNIT];
    };
    struct Lane {
        std::deque<Pending> pending;
        std::vector<Echo> echoes;
        uint32_t weight;
        bool busy() const { return !pending.empty() || !echoes.empty(); }
    };

    Lane& lane(int source, int peer, int channel) {
        return lanes_[size_t((source * nodes_ + peer) * channels_ + channel)];
    }

    uint8_t* bytes(int node, const epcomm_fabric_place& place, uint64_t count) {
        if (count == 0) return nullptr;
        for (const Region& region : regions_[size_t(node)]) {
            if (region.id == place.region && place.offset + count <= region.bytes) {
                return static_cast<uint8_t*>(region.pointer) + place.offset;
            }
        }
        abort();
    }

    void deliver(Lane& lane, int peer, int source) {
        if (!lane.echoes.empty() && (lane.pending.empty() || random() % 4 == 0)) {
            const Echo echo = lane.echoes.back();
            lane.echoes.pop_back();
            memcpy(echo.to, echo.bytes, sizeof echo.bytes);
            return;
        }
        // Mostly the oldest operation, sometimes bytes of a later one.
        const size_t index = random() % 4 == 0 ? random() % lane.pending.size() : 0;
        Pending& chosen = lane.pending[index];
        if (!chosen.pieces.empty() && random() % 8 != 0) {
            Piece& piece = chosen.pieces[random() % chosen.pieces.size()];
            land(chosen, piece, peer);
            return;
        }
        complete_oldest(lane, peer, source);
    }

    void land(const Pending& pending, Piece& piece, int peer) {
        const Command& command = pending.operation.command;
        ++piece.landed;
        memcpy(bytes(peer, command.remote, command.bytes) + piece.at, pending.from + piece.at,
               EPCOMM_FABRIC_UNIT);
    }

    void complete_oldest(Lane& lane, int peer, int source) {
        Pending& oldest = lane.pending.front();
        const Command& command = oldest.operation.command;
        const bool signals = command.op != EPCOMM_FABRIC_PUT;
        const bool early = fault_ == Fault::kSignalBeforeData && signals;
        if (early) raise(peer, command);
        for (Piece& piece : oldest.pieces) {
            if (piece.landed != 0) continue;
            // An early signal is seen for a while before the rest lands.
            if (early) {
                oldest.operation.command.op = EPCOMM_FABRIC_PUT;
                return;
            }
            land(oldest, piece, peer);
        }
        if (signals && !early) raise(peer, command);
        if (fault_ == Fault::kSignalTwice && signals && random() % 16 == 0) raise(peer, command);
        if (fault_ == Fault::kDataAfterSignal && random() % 4 == 0) echo(lane, oldest, peer);
        done(source, command.channel).push_back(oldest.operation.token);
        lane.pending.pop_front();
    }

    void echo(Lane& lane, const Pending& pending, int peer) {
        const Command& command = pending.operation.command;
        for (const Piece& piece : pending.pieces) {
            Echo echo;
            echo.to = bytes(peer, command.remote, command.bytes) + piece.at;
            memcpy(echo.bytes, pending.from + piece.at, sizeof echo.bytes);
            lane.echoes.push_back(echo);
        }
    }

    void raise(int peer, const Command& command) {
        const uint64_t offset = uint64_t(command.signal) * sizeof(uint64_t);
        uint8_t* at = bytes(peer, {EPCOMM_FABRIC_SIGNALS, 0, offset}, sizeof(uint64_t));
        __atomic_fetch_add(reinterpret_cast<uint64_t*>(at),
                           command.op == EPCOMM_FABRIC_SIGNAL_ADD ? command.value : 1,
                           __ATOMIC_RELEASE);
    }

    const Fault fault_;
    const int nodes_, channels_;
    std::vector<Lane> lanes_;
    std::vector<std::vector<Region>> regions_;
    std::vector<std::vector<uint64_t>> done_;
};

/// The network as a transport behind proxy threads: ranks of one process, by node.
class Transport : public epcomm::fabric::Transport {
 public:
    /// The network that transports made from now on belong to.
    static inline Network* network = nullptr;
    static inline std::mutex lock;

    /// The test tells the network about all regions before any rank may send.
    void add_region(const Region&) override {}
    void open(const Plan& plan) override { plan_ = plan; }
    std::string address(int32_t) override { return ""; }
    void connect(const std::vector<std::string>&) override {}

    size_t post(int32_t, const Operation* operations, size_t count) override {
        const std::lock_guard<std::mutex> guard(lock);
        // Sometimes only a part is accepted.
        count = network->random() % 4 == 0 ? count / 2 : count;
        for (size_t i = 0; i < count; ++i) network->post(plan_.node, operations[i]);
        return count;
    }

    size_t poll(int32_t lane, Completion* completions, size_t capacity) override {
        const std::lock_guard<std::mutex> guard(lock);
        for (uint32_t steps = network->random() % 8; steps > 0; --steps) network->step();
        size_t count = 0;
        for (int32_t channel = 0; channel < plan_.num_channels; ++channel) {
            if (plan_.lane_of(channel) != lane) continue;
            std::vector<uint64_t>& tokens = network->done(plan_.node, channel);
            while (count < capacity && !tokens.empty()) {
                completions[count++] = {tokens.back(), true, 0, 0};
                tokens.pop_back();
            }
        }
        return count;
    }

    std::string error_text(const Completion&) const override { return ""; }
    std::string describe() const override { return "chaos"; }
    void close() override {}

 private:
    Plan plan_{};
};

inline const RegisterTransport kChaos("chaos", []() -> std::unique_ptr<epcomm::fabric::Transport> {
    return std::make_unique<Transport>();
});

}  // namespace chaos
