// A proxy that delivers as late and as disorderly as the fabric's promises allow.
#pragma once

#include <string.h>

#include <random>
#include <vector>

#include "../../csrc/fabric/ring.h"
#include "emulated_world.h"

/// Takes triggers out of a rank's rings and carries them out in random order. Bytes are read and
/// written only then, and a signal follows its own bytes; nothing else is kept in order.
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
                    pending_.push_back(command);
                    ++taken[r];
                }
                __atomic_store_n(&ring.consumer->tail, taken[r], __ATOMIC_RELEASE);
            }
            if (!pending_.empty() && random_() % 3 == 0) deliver_one();
            sched_yield();
        }
    }

 private:
    void deliver_one() {
        const size_t i = random_() % pending_.size();
        const epcomm::fabric::Command command = pending_[i];
        pending_.erase(pending_.begin() + int64_t(i));
        if (me_.silent_after >= 0 && delivered_ >= me_.silent_after) return;
        ++delivered_;
        const emulated_member& peer = members_[me_.rail[command.peer]];
        memcpy(peer.regions[command.remote.region] + command.remote.offset,
               me_.regions[command.local.region] + command.local.offset, command.bytes);
        if (command.op == EPCOMM_FABRIC_PUT) return;
        auto* signals = reinterpret_cast<uint64_t*>(peer.regions[EPCOMM_FABRIC_SIGNALS]);
        const uint64_t amount = command.op == EPCOMM_FABRIC_SIGNAL_ADD ? command.value : 1;
        __atomic_fetch_add(signals + command.signal, amount, __ATOMIC_RELEASE);
    }

    const emulated_member* members_;
    const emulated_member& me_;
    std::mt19937_64 random_;
    std::vector<epcomm::fabric::Command> pending_;
    int delivered_ = 0;
};
