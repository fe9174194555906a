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

/// Whether entry `number` has been written and is of a request that went well; then also its tail.
EPCOMM_HD inline bool load_good(const SendQueue& queue, uint64_t number, Tail* tail) {
    const Tail seen = load_tail(&queue.completions[number & (queue.num_completions - 1)]);
    if (!is_valid(seen, number, queue.num_completions)) return false;
    if (opcode_of(seen.opcode_owner) != kCompleted) return false;
    *tail = seen;
    return true;
}

/// The last good entry from the good one `number` on, less than a lap behind it, and its tail.
///
/// Requests complete in order and nothing goes well behind an error. So an entry that is good
/// speaks for those before it, whether they can be seen yet or not, and none of them is the first
/// error. Steps that double and then halve: whoever waits for something else may find hundreds of
/// entries that nobody has read, and one after the other they would take a millisecond.
EPCOMM_HD inline uint64_t find_last_good(const SendQueue& queue, uint64_t number, Tail* tail) {
    const uint32_t longest = queue.num_completions / 2;
    uint32_t step = 1;
    EPCOMM_NO_UNROLL
    for (; step < longest && load_good(queue, number + step, tail); step *= 2) number += step;
    EPCOMM_NO_UNROLL
    for (step /= 2; step != 0; step /= 2) {
        if (load_good(queue, number + step, tail)) number += step;
    }
    return number;
}

/// Read what completions there are. False: the queue has failed.
EPCOMM_HD inline bool poll(SendQueue* queue) {
    while (true) {
        // Mostly there is nothing, so as few loads as that takes wait for each other.
        const uint32_t failed = fabric::load_relaxed(&queue->failed);
        const uint64_t count = fabric::load_acquire(&queue->polled);
        if (failed != kQueueWorks) return works(*queue);
        Tail tail = load_tail(&queue->completions[count & (queue->num_completions - 1)]);
        if (!is_valid(tail, count, queue->num_completions)) return true;
        const bool good = opcode_of(tail.opcode_owner) == kCompleted;
        const uint64_t last = good ? find_last_good(*queue, count, &tail) : count;
        const uint64_t done = fabric::load_acquire(&queue->done);
        fabric::interleave();
        // If nobody has read entry `count` yet, nobody had when `done` was loaded: it is not past
        // the request of that one, and the distance is less than the ring. If somebody has, entries
        // may be of a later lap; who is late by a whole lap fails the exchange, and must not judge.
        if (fabric::load_acquire(&queue->polled) != count) continue;
        const uint16_t distance = uint16_t(tail.index - uint16_t(done));
        const Completion* entry = &queue->completions[last & (queue->num_completions - 1)];
        if (!good) {
            keep_error(queue, entry, done + distance, kQueueError);
        } else if (distance >= queue->num_blocks) {
            keep_error(queue, entry, done + distance, kQueueConfused);
        } else if (exchange_if(&queue->polled, count, last + 1)) {
            // The last one was read with acquire; raising `done` hands that on to who reuses slots.
            raise_to(&queue->done, done + distance + 1);
        }
    }
}

}  // namespace epcomm::mlx5
