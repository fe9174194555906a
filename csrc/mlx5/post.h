// Posting and waiting: what puts the steps of queue.h and completion.h together.
//
// Every wait takes a `Wait` with `bool again()`: pause, and say whether to go on. Deadlines, abort
// flags and, in tests, the next step of the emulated NIC are its business.
//
// Groups post together: lane i of a warp writes every 32nd request from i.
#pragma once

#include "completion.h"
#include "group.h"

namespace epcomm::mlx5 {

/// Look for completions and see that what is ready has been rung for; then pause. False: the queue
/// failed or the wait is over.
template <class Wait>
EPCOMM_HD inline bool wait_on(SendQueue* queue, Wait& wait) {
    ring(queue);
    return poll(queue) && wait.again();
}

/// Reserve `count` positions, at most max_at_once, and wait until their slots are free. False: the
/// queue can't be used any more, or `count` is too much for it.
template <class Wait>
EPCOMM_HD inline bool reserve(SendQueue* queue, uint32_t count, Wait& wait, uint64_t* first) {
    // `done` only grows, so what it was before will do, and both loads wait together.
    const uint32_t failed = fabric::load_relaxed(&queue->failed);
    const uint64_t done = fabric::load_acquire(&queue->done);
    if (failed != kQueueWorks || count > max_at_once(*queue)) return false;
    *first = fabric::fetch_add(&queue->reserved, count);
    if (*first + count - done <= queue->num_blocks) return true;
    while (!has_room(*queue, *first + count)) {
        if (wait_on(queue, wait)) continue;
        // The reserved positions will never be published.
        if (works(*queue)) give_up(queue, kQueueTimeout);
        return false;
    }
    return true;
}

/// Wait for this writer's turn, which `end_turn` must end soon: everybody behind waits for it.
template <class Wait>
EPCOMM_HD inline bool take_turn(SendQueue* queue, uint64_t first, Wait& wait) {
    while (!try_turn(queue, first)) {
        if (works(*queue) && wait.again()) continue;
        if (works(*queue)) give_up(queue, kQueueTimeout);
        return false;
    }
    return true;
}

/// Post `count` requests: `make(i, position)` returns the i-th block, with
/// `header_of(queue, position, ...)` in it. Returns the position behind the last one; 0: failed.
/// Called by all threads of the group.
template <class Group, class Make, class Wait>
EPCOMM_HD inline uint64_t post(Group group, SendQueue* queue, uint32_t count, Ring when,
                               const Make& make, Wait& wait) {
    uint64_t first = 0;
    bool ok = group.lane() != 0 || reserve(queue, count, wait, &first);
    ok = group.from_first(int(ok)) != 0;
    if (!ok) return 0;
    first = group.from_first(first);
    for (uint32_t i = group.lane(); i < count; i += group.size()) {
        store_request(queue, first + i, make(i, first + i));
    }
    group.sync();
    ok = group.lane() != 0 || take_turn(queue, first, wait);
    if (group.lane() == 0 && ok) end_turn(queue, first, first + count, when);
    ok = group.from_first(int(ok)) != 0;
    return ok ? first + count : 0;
}

/// Post `count` requests and one behind them whose content depends on what was posted before it:
/// `last(position)` is called in this writer's turn. One thread.
template <class Make, class Last, class Wait>
EPCOMM_HD inline uint64_t post_in_turn(SendQueue* queue, uint32_t count, Ring when,
                                       const Make& make, const Last& last, Wait& wait) {
    uint64_t first = 0;
    if (!reserve(queue, count + 1, wait, &first)) return 0;
    for (uint32_t i = 0; i < count; ++i) store_request(queue, first + i, make(i, first + i));
    if (!take_turn(queue, first, wait)) return 0;
    store_request(queue, first + count, last(first + count));
    const uint64_t end = first + count + 1;
    end_turn(queue, first, end, when);
    return end;
}

/// See to it that a completion will come that covers every position below `end`, which the caller
/// knows to be reserved.
template <class Wait>
EPCOMM_HD inline bool ask(SendQueue* queue, uint64_t end, Wait& wait) {
    if (fabric::load_acquire(&queue->asked) >= end) return true;
    const auto make = [queue](uint32_t, uint64_t position) {
        return nop_request(header_of(*queue, position, true));
    };
    const uint64_t covered = post(OneThread(), queue, 1, Ring::kNow, make, wait);
    if (covered == 0) return false;
    raise_to(&queue->asked, covered);
    return true;
}

/// Wait until every request posted before (in this thread's order) has completed: written at the
/// peer and acknowledged. False: an error, or the wait is over; then nothing is known about them.
template <class Wait>
EPCOMM_HD inline bool flush(SendQueue* queue, Wait& wait) {
    const uint64_t end = fabric::load_relaxed(&queue->reserved);
    if (fabric::load_acquire(&queue->done) < end && !ask(queue, end, wait)) return false;
    while (fabric::load_acquire(&queue->done) < end) {
        if (!wait_on(queue, wait)) return false;
    }
    return works(*queue);
}

}  // namespace epcomm::mlx5
