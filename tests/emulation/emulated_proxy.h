// A proxy that delivers as late and as disorderly as the fabric's promises allow.
#pragma once

#include <string.h>

#include <random>
#include <vector>

#include "../../csrc/fabric/ring.h"
#include "emulated_world.h"

/// Takes triggers out of a rank's rings and carries them out in random order: bytes early or late,
/// and each signal once all bytes are there that were put before it on its (peer, channel).
class Proxy {
 public:
    Proxy(const emulated_member* members, int rank, uint64_t seed)
        : members_(members), me_(members[rank]), random_(seed) {}

    void run(const int* running) {
        uint64_t taken[EPCOMM_FABRIC_MAX_RINGS] = {};
        for (int r = 0; r < me_.proxied->num_rings; ++r) {
            taken[r] = me_.proxied->rings[r].consumer->tail;  // of earlier runs
        }
        while (__atomic_load_n(running, __ATOMIC_ACQUIRE) > 0 || !pending_.empty()) {
            for (int r = 0; r < me_.proxied->num_rings; ++r) {
                const epcomm_ring& ring = me_.proxied->rings[r];
                epcomm::fabric::Command command;
                while (epcomm::fabric::take(ring, taken[r], &command)) {
                    pending_.push_back({command, epcomm::fabric::now_ns() + draw_lateness()});
                    ++taken[r];
                }
                __atomic_store_n(&ring.consumer->tail, taken[r], __ATOMIC_RELEASE);
            }
            if (!pending_.empty() && random_() % 3 == 0) deliver_one();
            sched_yield();
        }
    }

 private:
    struct Pending {
        epcomm::fabric::Command command;
        int64_t due_ns;
        bool landed = false;  ///< its bytes are there, and do not land again
    };

    int64_t draw_lateness() {
        return me_.late_ns == 0 ? 0 : int64_t(random_() % uint64_t(me_.late_ns));
    }

    void deliver_one() {
        const size_t i = random_() % pending_.size();
        if (pending_[i].due_ns > epcomm::fabric::now_ns()) return;
        const epcomm::fabric::Command command = pending_[i].command;
        const bool silent = me_.silent_after >= 0 && delivered_ >= me_.silent_after;
        if (!silent) {
            land(pending_[i]);
            if (random_() % 4 == 0) return;  // its signal comes another time
            for (size_t j = 0; j < i; ++j) {
                const epcomm::fabric::Command& before = pending_[j].command;
                if (before.peer == command.peer && before.channel == command.channel) {
                    land(pending_[j]);
                }
            }
            raise(command);
            ++delivered_;
        }
        pending_.erase(pending_.begin() + int64_t(i));
    }

    const emulated_member& peer_of(const epcomm::fabric::Command& command) const {
        return members_[me_.rail[command.peer]];
    }

    void land(Pending& pending) {
        if (pending.landed) return;
        pending.landed = true;
        const epcomm::fabric::Command& command = pending.command;
        memcpy(peer_of(command).regions[command.remote.region] + command.remote.offset,
               me_.regions[command.local.region] + command.local.offset, command.bytes);
    }

    void raise(const epcomm::fabric::Command& command) {
        if (command.op == EPCOMM_FABRIC_PUT) return;
        uint8_t* region = peer_of(command).regions[EPCOMM_FABRIC_SIGNALS];
        const uint64_t amount = command.op == EPCOMM_FABRIC_SIGNAL_ADD ? command.value : 1;
        __atomic_fetch_add(reinterpret_cast<uint64_t*>(region) + command.signal, amount,
                           __ATOMIC_RELEASE);
    }

    const emulated_member* members_;
    const emulated_member& me_;
    std::mt19937_64 random_;
    std::vector<Pending> pending_;  ///< in the order of their ring
    int delivered_ = 0;
};
