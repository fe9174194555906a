// Off a dead plane: what a failed queue pair has not brought to its peer goes there by a queue pair
// of another plane, and so does all that follows on that lane.
//
// One thread at a time, under a lock of the fabric, does for a failed queue:
//
//     close   nobody publishes in it any more: what is published is known. Writers that had only
//             reserved find it failed and post again, on the successor.
//     judge   read the peer's counters over the successor, and pass over every request up to the
//             last signal that has taken effect: bytes must not land again once the signal behind
//             them has, because their place may have been used again.
//     again   post the rest on the successor, in order: data before its signal, on one queue.
//     moved   only now may the lane's writers go to the successor, behind all that.
//
// A successor that fails meanwhile is moved first: what was sent again on it is among its requests.
//
// The calls for kernels and host threads, on a Planes, are those of ibgda.h.
//
// This relies on the NIC: a queue pair in error sends nothing any more. What it sent before may
// still be on its way; see quiet. docs/ibgda.md has the arguments.
#pragma once

#include "ibgda.h"

namespace epcomm::fabric {

/// Whether another plane may do better: the way failed, not the request.
EPCOMM_HD inline bool is_of_the_way(const mlx5::SendQueue& queue) {
    return load_acquire(&queue.failed) == mlx5::kQueueError &&
           (queue.error.syndrome == mlx5::kRetryExceeded || queue.error.syndrome == mlx5::kFlushed);
}

/// Who has a queue's traffic now: itself, or the last of its successors that have all of it.
EPCOMM_HD inline mlx5::SendQueue* heir_of(const Ibgda& fabric, mlx5::SendQueue* queue) {
    while (load_acquire(&queue->moved) != 0) {
        queue = queue_at(fabric, int32_t(queue->successor) - 1);
    }
    return queue;
}

/// A plane is dead for a peer once one of its queue pairs there has failed.
EPCOMM_HD inline bool is_dead(const Ibgda& fabric, int32_t peer, int32_t plane) {
    for (int32_t c = plane; c < fabric.num_channels; c += fabric.num_planes) {
        if (!mlx5::works(*queue_of(fabric, {peer, c}))) return true;
    }
    return false;
}

/// A queue pair to the same peer on a plane that lives; null: there is none.
EPCOMM_HD inline mlx5::SendQueue* choose_successor(const Ibgda& fabric, Lane lane) {
    for (int32_t i = 1; i < fabric.num_channels; ++i) {
        const Lane other = {lane.peer, (lane.channel + i) % fabric.num_channels};
        if (!is_dead(fabric, lane.peer, plane_of(fabric, other))) return queue_of(fabric, other);
    }
    return nullptr;
}

/// Tell the host, once for a peer's plane, which can have several queue pairs.
EPCOMM_HD inline void record_loss(const Ibgda& fabric, const mlx5::SendQueue* queue) {
    const Lane lane = lane_of(fabric, queue);
    const int32_t plane = plane_of(fabric, lane);
    for (int32_t c = plane; c < fabric.num_channels; c += fabric.num_planes) {
        if (queue_of(fabric, {lane.peer, c})->successor != 0) return;
    }
    const uint32_t count = load_acquire(&fabric.state->num_losses);
    if (count < EPCOMM_FABRIC_MAX_LOSSES) {
        epcomm_fabric_loss* loss = &fabric.state->losses[count];
        loss->peer = lane.peer;
        loss->plane = plane;
        loss->channel = lane.channel;
        loss->vendor = vendor_of(*queue);
        loss->queue_pair = queue->number;
        loss->position = queue->error_position;
    }
    store_release(&fabric.state->num_losses, count + 1);
}

/// Every plane to a peer is dead: report what killed the first.
EPCOMM_HD inline void report_first_loss(const Ibgda& fabric, int32_t peer, Call call) {
    const uint32_t count = load_acquire(&fabric.state->num_losses);
    for (uint32_t i = 0; i < count && i < EPCOMM_FABRIC_MAX_LOSSES; ++i) {
        const epcomm_fabric_loss& loss = fabric.state->losses[i];
        if (loss.peer == peer) return report(fabric, queue_of(fabric, {peer, loss.channel}), call);
    }
}

/// Wait until nothing can be on its way any more. Where retries were exceeded there is nothing: the
/// last answer was waited for longer than a packet lives. Other errors come at once.
EPCOMM_HD inline void quiet(const mlx5::SendQueue& queue, FabricWait& wait) {
    constexpr int64_t kPacketLifeNs = 1'000'000;
    if (queue.error.syndrome == mlx5::kRetryExceeded) return;
    const int64_t until = now_ns() + kPacketLifeNs;
    while (now_ns() < until && wait.again()) {
    }
}

/// Close a failed queue and choose its successor. False: there is none, which has been reported, or
/// the wait is over.
EPCOMM_HD inline bool begin_move(const Ibgda& fabric, mlx5::SendQueue* queue, Call call,
                                 FabricWait& wait) {
    while (!mlx5::try_close(queue)) {
        if (!wait.again()) return false;
    }
    quiet(*queue, wait);
    if (failed(fabric)) return false;
    const Lane lane = lane_of(fabric, queue);
    record_loss(fabric, queue);
    const mlx5::SendQueue* successor = choose_successor(fabric, lane);
    if (successor == nullptr) {
        report_first_loss(fabric, lane.peer, call);
        return false;
    }
    // Everything before the one that failed has completed.
    queue->again = queue->error_position;
    queue->successor = uint32_t(successor - queue_at(fabric, 0)) + 1;
    return true;
}

struct Place {
    uint64_t address;
    uint32_t key;
};

/// The same place with the keys of another plane. What is in no region stays: its error is to come.
EPCOMM_HD inline Place place_on(const RegionKey* from, const RegionKey* to, Place place) {
    for (int32_t i = 0; i < EPCOMM_FABRIC_MAX_REGIONS; ++i) {
        const uint64_t offset = place.address - from[i].address;
        if (from[i].key != place.key || offset >= from[i].bytes) continue;
        return {to[i].address + offset, to[i].key};
    }
    return place;
}

/// A request taken to pieces. epcomm writes no others than these.
struct Posted {
    mlx5::Block block;
    mlx5::Control control;
    mlx5::Remote remote;
    mlx5::Data data;

    EPCOMM_HD Posted(const mlx5::SendQueue& queue, uint64_t position)
        : block(queue.ring[position & (queue.num_blocks - 1)]) {
        memcpy(&control, &block.unit[0], sizeof control);
        memcpy(&remote, &block.unit[1], sizeof remote);
        memcpy(&data, &block.unit[2], sizeof data);
    }
    EPCOMM_HD uint8_t opcode() const { return uint8_t(uint32_t(control.operation)); }
    EPCOMM_HD bool is_write() const { return opcode() == mlx5::kRdmaWrite; }
    /// Only signals are inline.
    EPCOMM_HD bool is_signal() const { return is_write() && (data.bytes & mlx5::kInline) != 0; }
    EPCOMM_HD uint64_t value() const {
        return block.unit[2].word[1] | uint64_t(block.unit[2].word[2]) << 32;
    }
};

/// From a queue to its successor.
struct Move {
    const Ibgda& fabric;
    mlx5::SendQueue* from;
    mlx5::SendQueue* to;
    const RegionKey *remote_from, *remote_to, *local_from, *local_to;

    EPCOMM_HD Move(const Ibgda& f, mlx5::SendQueue* source, mlx5::SendQueue* target)
        : fabric(f), from(source), to(target) {
        const int32_t peer = lane_of(f, source).peer;
        const int32_t old = plane_of(f, lane_of(f, source));
        const int32_t now = plane_of(f, lane_of(f, target));
        remote_from = keys_on(f, f.remote, peer, old);
        remote_to = keys_on(f, f.remote, peer, now);
        local_from = keys_on(f, f.local, 0, old);
        local_to = keys_on(f, f.local, 0, now);
    }

    EPCOMM_HD Place remote_place(const Posted& posted) const {
        return place_on(remote_from, remote_to, {posted.remote.address, posted.remote.key});
    }

    /// What a signal has left at the peer. False: the successor has failed, or time is over.
    template <class Wait>
    EPCOMM_HD bool read_counter(const Posted& signal, Wait& wait, uint64_t* value) const {
        const Place at = remote_place(signal);
        const RegionKey& own = local_to[EPCOMM_FABRIC_SIGNALS];
        const Place answer = {own.address + uint64_t(fabric.num_signals) * sizeof *value, own.key};
        auto* word = reinterpret_cast<uint64_t*>(answer.address);
        store_release(word, kNoAnswer);
        const auto make = [&](uint32_t, uint64_t position) {
            return mlx5::read_request(mlx5::header_of(*to, position, true), {at.address, at.key},
                                      {answer.address, answer.key}, sizeof *value);
        };
        const uint64_t end = mlx5::post(mlx5::OneThread(), to, 1, mlx5::Ring::kNow, make, wait);
        if (end == 0) return false;
        while (load_acquire(&to->done) < end) {
            if (!mlx5::wait_on(to, wait)) return false;
        }
        return await_answer(word, wait, value);
    }

    /// Pass over what has taken effect. Requests do so in order, so the first signal that the peer
    /// has not got ends it.
    template <class Wait>
    EPCOMM_HD bool judge(uint64_t end, Wait& wait) const {
        for (uint64_t position = from->again; position != end; ++position) {
            const Posted posted(*from, position);
            if (!posted.is_signal()) continue;
            uint64_t value;
            if (!read_counter(posted, wait, &value)) return false;
            if (value < posted.value()) break;
            from->again = position + 1;
        }
        from->judged = 1;
        return true;
    }

    EPCOMM_HD mlx5::Block renewed(const Posted& posted, uint64_t position) const {
        mlx5::Block block = posted.block;
        const bool asked = (posted.control.flags & mlx5::kCompletionMask) == mlx5::kCompletion;
        block.unit[0] =
            mlx5::control_unit(mlx5::header_of(*to, position, asked), mlx5::Opcode(posted.opcode()),
                               posted.control.queue_pair & 0xff);
        if (!posted.is_write()) return block;
        const Place remote = remote_place(posted);
        block.unit[1] = mlx5::remote_unit({remote.address, remote.key});
        if (posted.is_signal()) return block;
        const Place local = place_on(local_from, local_to, {posted.data.address, posted.data.key});
        block.unit[2] = mlx5::data_unit({local.address, local.key}, posted.data.bytes);
        return block;
    }

    /// Send the rest again. False: the successor has failed, or time is over; what it has got is
    /// passed over when this is called once more, with another one.
    template <class Wait>
    EPCOMM_HD bool run(Wait& wait) const {
        const uint64_t end = mlx5::ready_of(*from);
        if (from->judged == 0 && !judge(end, wait)) return false;
        for (; from->again != end; ++from->again) {
            const Posted posted(*from, from->again);
            // What a move before this one read is of no use any more.
            if (posted.opcode() == mlx5::kRdmaRead) continue;
            const auto make = [&](uint32_t, uint64_t position) {
                return renewed(posted, position);
            };
            if (mlx5::post(mlx5::OneThread(), to, 1, mlx5::Ring::kWhenDue, make, wait) == 0) {
                return false;
            }
        }
        mlx5::ring(to);
        return true;
    }
};

/// Move a failed queue, and before it those that were to take over from it and have failed as well.
/// Under the lock. False: the fabric has failed.
EPCOMM_HD inline bool move_queue(const Ibgda& fabric, mlx5::SendQueue* queue, Call call,
                                 FabricWait& wait) {
    while (load_acquire(&queue->moved) == 0) {
        mlx5::SendQueue *from = queue, *to = nullptr;
        while (true) {
            if (!is_of_the_way(*from)) {
                report(fabric, from, call);
                return false;
            }
            if (from->successor == 0 && !begin_move(fabric, from, call, wait)) return false;
            to = heir_of(fabric, queue_at(fabric, int32_t(from->successor) - 1));
            if (mlx5::works(*to)) break;
            from = to;
        }
        if (Move(fabric, from, to).run(wait)) {
            from->successor = uint32_t(to - queue_at(fabric, 0)) + 1;
            from->again_end = load_relaxed(&to->reserved);
            store_release(&from->moved, 1u);
        } else if (mlx5::works(*to)) {
            return false;  // the fabric's end, or the deadline
        }
    }
    return true;
}

/// Lanes go on with the queue that takes over, once it has all that was lost.
struct MoveLane {
    EPCOMM_COLD static int32_t next_channel(const Ibgda& fabric, Lane lane, Call call) {
        FabricWait wait(fabric, fabric.timeout_ns);
        uint64_t* lock = &fabric.raised[int64_t(fabric.num_nodes) * fabric.num_signals];
        while (true) {
            mlx5::SendQueue* queue = heir_of(fabric, queue_of(fabric, lane));
            if (mlx5::works(*queue)) return lane_of(fabric, queue).channel;
            bool good = is_of_the_way(*queue);
            if (good && mlx5::exchange_if(lock, 0, 1)) {
                good = move_queue(fabric, queue, call, wait);
                store_release(lock, uint64_t(0));
            } else if (good) {
                good = wait.again();
            }
            if (good) continue;
            report(fabric, queue, call);
            return -1;
        }
    }
};

/// A fabric whose lanes move off dead planes.
struct Planes {
    const Ibgda& ibgda;
    epcomm_fabric_state* state;

    EPCOMM_HD explicit Planes(const Ibgda& fabric) : ibgda(fabric), state(fabric.state) {}
};

EPCOMM_HD inline bool failed(const Planes& fabric) { return failed(fabric.ibgda); }

EPCOMM_HD inline Ticket put(const Planes& fabric, Lane lane, epcomm_fabric_place remote,
                            epcomm_fabric_place local, uint64_t bytes) {
    return push<MoveLane>(fabric.ibgda, put_command(lane, remote, local, bytes));
}

EPCOMM_HD inline Ticket put_signal(const Planes& fabric, Lane lane, epcomm_fabric_place remote,
                                   epcomm_fabric_place local, uint64_t bytes, int32_t signal) {
    return push<MoveLane>(fabric.ibgda, put_signal_command(lane, remote, local, bytes, signal));
}

EPCOMM_HD inline Ticket signal_add(const Planes& fabric, Lane lane, int32_t signal,
                                   uint64_t value) {
    return push<MoveLane>(fabric.ibgda, signal_add_command(lane, signal, value));
}

EPCOMM_HD inline void look(const Planes& fabric, Lane lane) {
    look_at_queue<MoveLane>(fabric.ibgda, lane);
}

/// Waits for the peer only where a plane has died.
EPCOMM_HD inline bool done(const Planes& fabric, int32_t /*channel*/, Ticket ticket) {
    return ticket_is_done<MoveLane>(fabric.ibgda, ticket);
}

EPCOMM_HD inline bool flush(const Planes& fabric, int32_t channel, int64_t timeout_ns) {
    return flush_channel<MoveLane>(fabric.ibgda, channel, timeout_ns);
}

}  // namespace epcomm::fabric
