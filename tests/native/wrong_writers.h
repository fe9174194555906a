// Writers of a queue that make one mistake each, step by step: threads of the host, or kernels.
//
// A right writer's steps are those of post.h, taken apart, so that others can come between any two.
#pragma once

#include "../../csrc/mlx5/post.h"

namespace writers {

using namespace epcomm;
using mlx5::Header;
using mlx5::Ring;
using mlx5::SendQueue;

/// What a writer does wrong, in one place each.
enum class Mistake : uint32_t {
    kNone,
    kWrongIndex,       ///< requests with the index of the next one
    kStoreBeforeRoom,  ///< stores its requests, then waits for the slots
    kNoRoomCheck,      ///< does not wait for the slots
    kNoRecord,         ///< rings without a doorbell record
    kRecordAfterDoorbell,
    kRecordIsLast,       ///< the index of the last request, not of the next
    kReceiveRecord,      ///< writes the other word of the record
    kDoorbellElsewhere,  ///< rings with another queue pair's number
    kPublishOutOfOrder,  ///< does not wait for the positions before its own
    kPublishBeforeStore,
    kSignalElsewhere,     ///< data on one queue pair, signal on another: the chunk's mistake
    kCompletionOffByOne,  ///< takes a completion for one request more than it covers
    kFlushOffByOne,       ///< takes all but the last requests for all
};

/// What comes next.
enum class Phase { kIdle, kReserved, kHasRoom, kStored, kPublished };

/// Fills one chunk's requests in. A Chunk says what they are:
///
///     uint32_t count()                                    how many
///     Block request(uint32_t i, const Header& header)     the i-th; the last one is the signal
template <class Chunk>
struct Writer {
    SendQueue* queue;
    Mistake mistake = Mistake::kNone;
    Ring when = Ring::kWhenDue;  ///< who has published may ring at once, or with the next step
    Chunk chunk = {};
    Phase phase = Phase::kIdle;
    uint64_t first = 0;

    EPCOMM_HD uint64_t end() const { return first + chunk.count(); }

    EPCOMM_HD void reserve(const Chunk& next) {
        chunk = next;
        first = fabric::fetch_add(&queue->reserved, chunk.count());
        if (mistake == Mistake::kStoreBeforeRoom) store();
        phase = Phase::kReserved;
    }

    /// Take a step, if it is possible. `look()` lets the NIC look at the doorbell.
    template <class Look>
    EPCOMM_HD void move(const Look& look) {
        switch (phase) {
            case Phase::kIdle: return;
            case Phase::kReserved:
                if (mistake != Mistake::kNoRoomCheck && !mlx5::has_room(*queue, end())) {
                    ring(look);
                    return poll();
                }
                phase = Phase::kHasRoom;
                return;
            case Phase::kHasRoom:
                if (mistake == Mistake::kPublishBeforeStore) {
                    if (!publish()) return;
                } else if (mistake != Mistake::kStoreBeforeRoom) {
                    store();
                }
                phase = Phase::kStored;
                return;
            case Phase::kStored:
                if (mistake == Mistake::kPublishBeforeStore) {
                    store();
                } else if (!publish()) {
                    return;
                }
                phase = Phase::kPublished;
                return;
            case Phase::kPublished: ring(look); phase = Phase::kIdle;
        }
    }

    EPCOMM_HD void poll() {
        const uint64_t before = fabric::load_acquire(&queue->done);
        mlx5::poll(queue);
        const uint64_t after = fabric::load_acquire(&queue->done);
        if (mistake == Mistake::kCompletionOffByOne && after != before) {
            mlx5::raise_to(&queue->done, after + 1);
        }
    }

    template <class Look>
    EPCOMM_HD void ring(const Look& look) {
        const uint64_t next = mlx5::ready_of(*queue);
        if (fabric::load_relaxed(&queue->rung) >= next) return;
        const auto record = [&](int word, uint64_t value) {
            mlx5::fence<mlx5::Scope::kSystem>();
            mlx5::store_record(&queue->record[word], uint16_t(value));
        };
        const auto doorbell = [&](uint32_t number) {
            mlx5::fence<mlx5::Scope::kSystem>();
            mlx5::store_doorbell(queue->doorbell,
                                 mlx5::next_index_doorbell(number, uint16_t(next)));
        };
        switch (mistake) {
            case Mistake::kNoRecord: doorbell(queue->number); break;
            case Mistake::kRecordAfterDoorbell:
                doorbell(queue->number);
                look();
                record(mlx5::kSendRecord, next);
                break;
            case Mistake::kRecordIsLast:
                record(mlx5::kSendRecord, next - 1);
                doorbell(queue->number);
                break;
            case Mistake::kReceiveRecord:
                record(mlx5::kSendRecord, next);
                record(mlx5::kReceiveRecord, next | 1);  // not 0, where the index wraps
                doorbell(queue->number);
                break;
            case Mistake::kDoorbellElsewhere:
                record(mlx5::kSendRecord, next);
                doorbell(queue->number ^ 1);
                break;
            default: mlx5::ring(queue); return;
        }
        fabric::store_relaxed(&queue->rung, next);
    }

 private:
    EPCOMM_HD void store() const {
        for (uint32_t i = 0; i < chunk.count(); ++i) {
            Header header = mlx5::header_of(*queue, first + i, false);
            if (mistake == Mistake::kWrongIndex) header.index += 1;
            mlx5::store_request(queue, first + i, chunk.request(i, header));
        }
    }

    /// Whether it was its turn, or it did not wait for that.
    EPCOMM_HD bool publish() const {
        if (mistake == Mistake::kPublishOutOfOrder) {
            mlx5::raise_to(&queue->ready, end());
        } else if (mlx5::try_turn(queue, first)) {
            mlx5::end_turn(queue, first, end(), when);
        } else {
            return false;
        }
        return true;
    }
};

/// Whether a writer takes everything that was reserved for completed.
EPCOMM_HD inline bool is_flushed(const SendQueue& queue, Mistake mistake) {
    const uint64_t done = fabric::load_acquire(&queue.done);
    return done + (mistake == Mistake::kFlushOffByOne ? 3 : 0) >=
           fabric::load_relaxed(&queue.reserved);
}

}  // namespace writers
