// A ring of triggers: many producers (device threads or host threads), one consumer (its proxy
// thread).
//
// A producer reserves a position with an atomic addition to the head, waits while the slot still
// belongs to the lap before, and publishes with one release store. It reads the tail, which lies in
// host memory, only when the value it saw last does not show that the slot is free.
//
// The tail says that a trigger was taken out, not that it was carried out; `completed` says that.
#pragma once

#include <stddef.h>

#include "atomics.h"
#include "trigger.h"

namespace epcomm::fabric {

/// Wait until the slot of `position` may be written. False: the fabric failed, or `timeout_ns`
/// passed. Then the reserved position stays empty and the consumer cannot pass it: the caller must
/// fail the fabric.
EPCOMM_HD inline bool wait_for_slot(const epcomm_ring& ring, uint64_t position,
                                    const uint32_t* failed, int64_t timeout_ns) {
    constexpr int kPolls = 16;
    // The tail cannot have passed a position that nobody has published; so no difference is
    // negative. Another producer may store an older tail over a newer one: that costs a look.
    if (position - load_acquire(&ring.producer->tail_seen) < ring.num_slots) return true;
    const int64_t start = now_ns();
    while (true) {
        for (int i = 0; i < kPolls; ++i) {
            // Acquire: the consumer has read the slot before it is written again.
            const uint64_t tail = load_acquire(&ring.consumer->tail);
            if (position - tail < ring.num_slots) {
                store_release(&ring.producer->tail_seen, tail);
                return true;
            }
        }
        if (load_acquire(failed) != 0 || now_ns() - start > timeout_ns) return false;
        relax();
    }
}

/// Publish a command at a position whose slot is free. Everything that happened before in this
/// thread is visible to whoever takes the trigger out.
EPCOMM_HD inline void publish(const epcomm_ring& ring, uint64_t position, const Command& command) {
    const epcomm_trigger trigger = encode(command, parity_of(position, ring.num_slots));
    epcomm_trigger* slot = &ring.slots[position & (ring.num_slots - 1)];
    store_release_pair(slot->word, trigger.word[0], trigger.word[1]);
}

/// Take the trigger at `position`, if it is there (acquire). The consumer raises the tail itself,
/// once for a batch.
inline bool take(const epcomm_ring& ring, uint64_t position, Command* command) {
    const epcomm_trigger* slot = &ring.slots[position & (ring.num_slots - 1)];
    const uint64_t parity = parity_of(position, ring.num_slots);
    const epcomm_trigger seen = {{load_acquire(&slot->word[0]), load_acquire(&slot->word[1])}};
    if ((seen.word[0] & kParity) != parity || (seen.word[1] & kParity) != parity) return false;
    *command = decode(seen);
    return true;
}

}  // namespace epcomm::fabric
