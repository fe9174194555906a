// A send queue as its writers see it: several threads of one process fill it and ring its doorbell.
//
//     reserve   take positions; wait until the NIC is done with what lies in their slots
//     store     write the requests, any thread any of them
//     publish   in order, a turn each: positions become `ready` once all before them are
//     ring      doorbell record, then doorbell, for everything ready; one thread at a time, which
//               takes that upon itself with the exchange that publishes
//     poll      (completion.h) read completions; raise `done`
//
// Positions are 64-bit and never wrap; the hardware sees their low 16 bits. A request takes one
// block, so positions count requests and a completion's index + 1 is the next position.
//
// WHY RESERVING CAN WAIT WITHOUT A DEADLOCK. Who waits for a slot waits for older positions only.
// Those are published without waiting for him; every `completion_interval`-th of them asks for a
// completion; and whoever waits rings for what is ready. Hence a reservation may have at most
// num_blocks - completion_interval positions.
#pragma once

#include "order.h"
#include "request.h"

namespace epcomm::mlx5 {

/// Why a queue can't be used any more. Once set, every call fails.
enum QueueFailure : uint32_t {
    kQueueWorks = 0,
    kQueueError = 1,     ///< an error completion, kept in `error`
    kQueueTimeout = 2,   ///< a writer gave up with positions reserved: nothing behind them can go
    kQueueConfused = 3,  ///< a completion of a request that was not under way, kept in `error`
    kQueueStopped = 4,   ///< something else failed; nothing is wrong with this queue
};

/// In memory that all its writers can change; the pointers are valid for them.
struct SendQueue {
    // Set up by the host, then only read.
    Block* ring;
    Completion* completions;  ///< its own completion ring
    Be32* record;             ///< doorbell record, kRecordWords
    uint64_t* doorbell;
    uint32_t num_blocks;           ///< a power of two, at most kMaxBlocks
    uint32_t num_completions;      ///< a power of two, at least num_blocks: it cannot overrun
    uint32_t number;               ///< queue pair number
    uint32_t completion_interval;  ///< a power of two
    uint32_t doorbell_interval;    ///< ring at the latest with so many requests ready

    // Positions. Each is changed by other operations than its neighbours.
    alignas(64) uint64_t reserved;    ///< next free
    alignas(64) uint64_t ready;       ///< and three bits, see ready_of
    alignas(64) uint64_t rung;        ///< below: the doorbell rang; changed by the one who rings
    alignas(64) uint64_t done;        ///< below: completed
    uint64_t polled;                  ///< completions read, counted from the start
    alignas(64) uint64_t asked;       ///< below: a completion was asked for
    alignas(64) uint64_t error_kept;  ///< 1: a thread keeps, or has kept, the first error
    ErrorCompletion error;
    uint64_t error_position;  ///< of its request
    uint32_t failed;          ///< QueueFailure

    // Of a queue that failed and that another one takes over from (fabric/planes.h).
    uint32_t successor;  ///< 1 + the other's place among the rank's queues; 0: there is none yet
    uint64_t again;      ///< next position that is to be sent again
    uint64_t again_end;  ///< position in the successor behind all that was
    uint32_t judged;     ///< 1: what has taken effect at the peer has been skipped
    uint32_t moved;      ///< 1: the successor has all of it
};

/// Start all counters at `position`, the hardware's at its low 16 bits (0 for a real one).
EPCOMM_HD inline void start_at(SendQueue* queue, uint64_t position) {
    queue->reserved = queue->ready = queue->rung = queue->done = queue->asked = position;
    queue->polled = queue->error_kept = queue->failed = 0;
    queue->successor = queue->judged = queue->moved = 0;
    queue->completion_interval = queue->num_blocks < 4 ? 1 : queue->num_blocks / 4;
    queue->doorbell_interval = queue->completion_interval;
}

EPCOMM_HD inline bool works(const SendQueue& queue) {
    return fabric::load_acquire(&queue.failed) == kQueueWorks;
}

EPCOMM_HD inline void give_up(SendQueue* queue, QueueFailure why) {
    fabric::store_release(&queue->failed, uint32_t(why));
}

EPCOMM_HD inline bool has_room(const SendQueue& queue, uint64_t end) {
    return end - fabric::load_acquire(&queue.done) <= queue.num_blocks;
}

/// The most positions that may be reserved at once; see above.
EPCOMM_HD inline uint32_t max_at_once(const SendQueue& queue) {
    return queue.num_blocks - queue.completion_interval;
}

/// Whether the request at `position` asks for a completion even if its writer needs none.
EPCOMM_HD inline bool completion_due(const SendQueue& queue, uint64_t position) {
    return ((position + 1) & (queue.completion_interval - 1)) == 0;
}

EPCOMM_HD inline Header header_of(const SendQueue& queue, uint64_t position, bool completion) {
    const bool ask = completion || completion_due(queue, position);
    return {queue.number, uint16_t(position), uint8_t(ask ? kCompletion : 0)};
}

/// Plain stores: `publish` releases them.
EPCOMM_HD inline void store_request(SendQueue* queue, uint64_t position, const Block& request) {
    Block* slot = &queue->ring[position & (queue->num_blocks - 1)];
    for (uint32_t i = 0; i < kUnitsPerBlock; ++i) {
#ifdef __CUDA_ARCH__
        reinterpret_cast<uint4*>(slot)[i] = reinterpret_cast<const uint4*>(&request)[i];
#else
        slot->unit[i] = request.unit[i];
#endif
    }
}

/// Bits of `ready` above the position: a writer has its turn; nobody gets it any more; a thread
/// rings for everything that is ready, also for what others publish until it clears the bit.
constexpr uint64_t kTurnTaken = uint64_t(1) << 63;
constexpr uint64_t kClosed = uint64_t(1) << 62;
constexpr uint64_t kRinging = uint64_t(1) << 61;

EPCOMM_HD inline uint64_t position_of(uint64_t ready) {
    return ready & ~(kTurnTaken | kClosed | kRinging);
}

/// Below: written, may be rung for.
EPCOMM_HD inline uint64_t ready_of(const SendQueue& queue) {
    return position_of(fabric::load_acquire(&queue.ready));
}

/// Once everything before `first` is published it is the turn of who has reserved that: of one
/// writer after the other, in the order of their positions, until `end_turn`. Acquires what the
/// ones before stored.
EPCOMM_HD inline bool try_turn(SendQueue* queue, uint64_t first) {
    uint64_t seen = first;
    while ((seen & ~kRinging) == first) {
        if (exchange_seen<Order::kAcquire>(&queue->ready, &seen, seen | kTurnTaken)) return true;
    }
    return false;
}

/// Let nobody publish any more. False: a writer has its turn.
EPCOMM_HD inline bool try_close(SendQueue* queue) {
    const uint64_t ready = fabric::load_acquire(&queue->ready);
    if ((ready & kClosed) != 0) return true;
    return (ready & kTurnTaken) == 0 && exchange_if(&queue->ready, ready, ready | kClosed);
}

/// Ring for `ready`, whose kRinging bit this thread has set, and for what others publish meanwhile.
/// Requests before that position, and the bytes they speak of, are behind a fence at system scope.
EPCOMM_HD inline void ring_for(SendQueue* queue, uint64_t ready) {
    while (true) {
        const uint64_t next = position_of(ready);
        store_record(&queue->record[kSendRecord], uint16_t(next));
        fence<Scope::kSystem>();  // the record before the doorbell
        store_doorbell(queue->doorbell, next_index_doorbell(queue->number, uint16_t(next)));
        fabric::store_relaxed(&queue->rung, next);
        // Who published and found the bit set has left. The exchange fails then: again, for him.
        do {
            if (exchange_seen<Order::kAcquireRelease>(&queue->ready, &ready, ready & ~kRinging)) {
                return;
            }
        } while (position_of(ready) == next);
        fence<Scope::kSystem>();
    }
}

/// When to ring: once so many requests are ready that the NIC should start on them, or at once.
enum class Ring { kWhenDue, kNow };

/// Publish up to `end`, and see to it that it is rung for.
EPCOMM_HD inline void end_turn(SendQueue* queue, uint64_t first, uint64_t end, Ring when) {
    const bool rings =
        when == Ring::kNow || end - fabric::load_relaxed(&queue->rung) >= queue->doorbell_interval;
    // Releases what this turn acquired and stored: to the next writer, or to the NIC.
    if (rings) {
        fence<Scope::kSystem>();
    } else {
        fence<Scope::kDevice>();
    }
    // The doorbell behind that of who rang before: hence acquire.
    uint64_t seen = first | kTurnTaken, next;
    do {
        next = end | (rings ? kRinging : seen & kRinging);
    } while (!exchange_seen<Order::kAcquire>(&queue->ready, &seen, next));
    if (rings && (seen & kRinging) == 0) ring_for(queue, next);
}

/// Ring for everything ready. If another thread is ringing, that one sees to it.
EPCOMM_HD inline void ring(SendQueue* queue) {
    uint64_t seen = fabric::load_acquire(&queue->ready);
    while ((seen & kRinging) == 0 && fabric::load_relaxed(&queue->rung) < position_of(seen)) {
        if (!exchange_seen<Order::kAcquire>(&queue->ready, &seen, seen | kRinging)) continue;
        fence<Scope::kSystem>();  // requests, and the bytes they speak of, before the record
        return ring_for(queue, seen | kRinging);
    }
}

}  // namespace epcomm::mlx5
