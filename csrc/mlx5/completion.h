// Reading a queue's completion ring; any number of its writers at a time, without a lock.
#pragma once

#include "queue.h"

namespace epcomm::mlx5 {

/// The last 8 bytes of an entry: what the NIC writes last, in one load.
struct Tail {
    Be32 queue_pair;
    Be16 index;
    uint8_t signature;
    uint8_t opcode_owner;
};
static_assert(sizeof(Tail) == 8, "one load");

EPCOMM_HD inline Tail load_tail(const Completion* entry) {
    const auto* words = reinterpret_cast<const uint64_t*>(entry);
    const uint64_t word = fabric::load_acquire(&words[sizeof *entry / 8 - 1]);
    Tail tail;
    memcpy(&tail, &word, sizeof tail);
    return tail;
}

/// Whether the entry of completion `count` has been written. The owner bit is the parity of the
/// lap, so an entry of the lap before is not taken for it.
EPCOMM_HD inline bool is_valid(const Tail& tail, uint64_t count, uint32_t num_completions) {
    const uint8_t owner = (count & num_completions) != 0 ? kOwnerBit : 0;
    return opcode_of(tail.opcode_owner) != kInvalid && (tail.opcode_owner & kOwnerBit) == owner;
}

/// Keep the first error. It must be kept before anybody may pass the entry: the flushed requests
/// behind it say nothing about the reason.
EPCOMM_HD inline void keep_error(SendQueue* queue, const Completion* entry, uint64_t position,
                                 QueueFailure why) {
    if (!exchange_if(&queue->error_kept, 0, 1)) return;
    memcpy(&queue->error, entry, sizeof queue->error);
    queue->error_position = position;
    give_up(queue, why);
}

/// Read what completions there are. False: the queue has failed.
EPCOMM_HD inline bool poll(SendQueue* queue) {
    while (true) {
        // Mostly there is nothing, so as few loads as that takes wait for each other.
        const uint32_t failed = fabric::load_relaxed(&queue->failed);
        const uint64_t count = fabric::load_acquire(&queue->polled);
        if (failed != kQueueWorks) return works(*queue);
        const Completion* entry = &queue->completions[count & (queue->num_completions - 1)];
        const Tail tail = load_tail(entry);
        if (!is_valid(tail, count, queue->num_completions)) return true;
        const uint64_t done = fabric::load_acquire(&queue->done);
        fabric::interleave();
        // If nobody has read this entry yet, nobody had when `done` was loaded: it is not past the
        // request of this one, and the distance is less than the ring. If somebody has, the entry
        // may be of a later lap; who is late by a whole lap fails the exchange, and must not judge.
        if (fabric::load_acquire(&queue->polled) != count) continue;
        const uint16_t distance = uint16_t(tail.index - uint16_t(done));
        if (opcode_of(tail.opcode_owner) != kCompleted) {
            keep_error(queue, entry, done + distance, kQueueError);
        } else if (distance >= queue->num_blocks) {
            keep_error(queue, entry, done + distance, kQueueConfused);
        } else if (exchange_if(&queue->polled, count, count + 1)) {
            // The entry was read with acquire; raising `done` hands that on to who reuses slots.
            raise_to(&queue->done, done + distance + 1);
        }
    }
}

}  // namespace epcomm::mlx5
