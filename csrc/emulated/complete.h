// Completions and the error state.
#pragma once

#include "queue_pair.h"

namespace epcomm::emulated {

/// Write the entry that is number `count`; the last 8 bytes, with index and owner bit, are released
/// after the others. `flight` is null where nothing is known of the request.
EPCOMM_HD inline void store_entry(const Context& context, const QueuePair& queue, uint64_t count,
                                  uint64_t position, const Flight* flight, uint8_t syndrome,
                                  uint8_t vendor) {
    const uint8_t owner = (count & queue.num_completions) != 0 ? mlx5::kOwnerBit : uint8_t(0);
    const uint32_t opcode = flight != nullptr ? flight->request.opcode : 0;
    union {
        mlx5::Completion good;
        mlx5::ErrorCompletion bad;
        uint64_t words[8];
    } entry;
    for (uint64_t& word : entry.words) word = 0;
    if (syndrome == 0) {
        entry.good.bytes = flight->request.bytes;
        entry.good.timestamp = context.now / kNanosecond;
    } else {
        entry.bad.syndrome = syndrome;
        entry.bad.vendor_syndrome = vendor;
    }
    const uint8_t kind = syndrome == 0 ? mlx5::kCompleted : mlx5::kRequestError;
    entry.good.queue_pair = opcode << 24 | queue.number;
    entry.good.index = uint16_t(position);
    entry.good.opcode_owner = uint8_t(kind << 4 | owner);
    auto* slot =
        reinterpret_cast<uint64_t*>(&queue.completions[count & (queue.num_completions - 1)]);
    for (int i = 0; i < 7; ++i) slot[i] = entry.words[i];
    fabric::store_release(&slot[7], entry.words[7]);
}

/// By one lane: the next entry, of a request that failed.
EPCOMM_COLD inline void write_error(const Context& context, QueuePair* queue, uint64_t position,
                                    const Flight* flight, uint8_t syndrome, uint8_t vendor) {
    const uint64_t count = queue->entries;
    // Counted before software can see it: what it does next must not look like an overflow.
    queue->entries += 1;
    queue->covered = position + 1;
    store_entry(context, *queue, count, position, flight, syndrome, vendor);
}

/// An atomic that read its word and will not write it any more lets others go on.
EPCOMM_COLD inline void let_go_of_atomics(const Context& context, QueuePair* queue) {
    if (queue->lock == 0) return;
    mlx5::exchange_if<mlx5::Scope::kSystem>(&context.wire->nic(queue->peer_nic).atomics,
                                            queue->lock, 0);
    queue->lock = 0;
}

/// In the error state every request, asked for or not, completes as flushed, also later ones. By
/// one lane, as what follows.
EPCOMM_COLD inline void flush_all(Context* context, QueuePair* queue) {
    for (; queue->completed != queue->posted; ++queue->completed) {
        write_error(*context, queue, queue->completed, nullptr, mlx5::kFlushed, kVendorFlushed);
        context->progress = true;
    }
    queue->fetched = queue->started = queue->landed = queue->posted;
}

/// The first request that is not complete fails with `syndrome` (0: none of them is to blame), what
/// is behind it is flushed.
EPCOMM_COLD inline void fail(Context* context, QueuePair* queue, uint8_t syndrome, uint8_t vendor) {
    context->progress = true;
    context->note(EventKind::kFailed, *queue, queue->completed,
                  syndrome == 0 ? uint8_t(mlx5::kFlushed) : syndrome);
    queue->state = kFailed;
    fabric::store_release(&queue->entry->state, uint32_t(kFailed));
    let_go_of_atomics(*context, queue);
    if (syndrome != 0) {
        const uint64_t position = queue->completed;
        const bool known = position < queue->fetched;
        write_error(*context, queue, position, known ? &queue->flight(position) : nullptr, syndrome,
                    vendor);
        if (queue->completed != queue->posted) queue->completed += 1;
    }
    flush_all(context, queue);
}

/// A rule of the interface was broken.
EPCOMM_COLD inline void violate(Context* context, QueuePair* queue, uint64_t position,
                                Violation what) {
    context->note(EventKind::kViolation, *queue, position, what);
    if (context->strict && queue->state != kFailed) {
        fail(context, queue, mlx5::kLocalOperation, uint8_t(kVendorViolation + what));
    }
}

EPCOMM_HD inline bool slot_changed(const QueuePair& queue, uint64_t position) {
    const uint32_t slot = uint32_t(position & (queue.num_blocks - 1));
    const auto* now = reinterpret_cast<const uint64_t*>(&queue.ring[slot]);
    const auto* then = reinterpret_cast<const uint64_t*>(&queue.shadow[slot]);
    uint64_t difference = 0;
    for (uint32_t i = 0; i < mlx5::kBlockBytes / 8; ++i) {
        difference |= fabric::load_relaxed(&now[i]) ^ then[i];
    }
    return difference != 0;
}

/// The first request in [from, end) that is not what it was when it was fetched; `end`: none.
template <class Group>
EPCOMM_HD inline uint64_t first_changed(Group group, const QueuePair& queue, uint64_t from,
                                        uint64_t end) {
    for (; from < end; from += group.size()) {
        const uint64_t position = from + group.lane();
        const uint32_t changed = group.ballot(position < end && slot_changed(queue, position));
        if (changed != 0) return from + mlx5::lowest(changed);
    }
    return end;
}

/// What an atomic read comes back.
EPCOMM_HD inline void return_old_value(const Context& context, const Flight& flight) {
    uint8_t* to =
        context.wire->reach(context.nic, flight.request.local_key, flight.request.local_address);
    if (reinterpret_cast<uintptr_t>(to) % 8 == 0) {
        *reinterpret_cast<uint64_t*>(to) = flight.old_value;
    } else {
        memcpy(to, &flight.old_value, 8);
    }
}

/// Complete those of one window that are due, in order. Whether there may be more.
template <class Group>
EPCOMM_HD inline bool complete_window(Group group, Context* context, QueuePair* queue) {
    const uint64_t first = queue->completed, entries = queue->entries, covered = queue->covered;
    const uint32_t width = context->width(group), lane = group.lane();
    const uint64_t position = first + lane;
    const Flight* flight = &queue->flight(position);
    Picoseconds due = kNever;
    bool bad = false, asked = false;
    if (lane < width && position < queue->fetched) {
        bad = flight->syndrome != 0;
        if (flight->completes_early) {
            due = 0;
        } else if (flight->landed || bad) {
            due = flight->times.complete;
        }
        asked = flight->request.asks_completion();
    }
    uint32_t count = mlx5::leading(group, due <= context->now);
    if (count < group.size()) context->wake_at(group.at(due, count));
    if (count == 0) return false;
    const uint32_t failing = group.ballot(lane < count && bad), failed = mlx5::lowest(failing);
    if (failing != 0) count = failed;
    // Slots that software may reuse once an entry is written must hold what was fetched from them:
    // else it reused them before.
    const uint32_t asking = group.ballot(lane < count && asked);
    uint64_t changed = kNever;
    if (asking != 0) {
        const uint64_t end = first + mlx5::highest(asking) + 1;
        changed = first_changed(group, *queue, covered, end);
        if (changed < end) {
            // The first entry that would cover it is not written.
            const uint32_t reached = changed < first ? 0 : uint32_t(changed - first);
            count = mlx5::lowest(asking & ~mlx5::below(reached));
        } else {
            changed = kNever;
        }
    }
    const uint32_t writing = asking & (count < 32 ? mlx5::below(count) : ~0u);
    if (lane < count && flight->request.is_atomic()) return_old_value(*context, *flight);
    group.sync();
    if (lane == 0) {
        // Counted before software can see it: what it does next must not look like an overflow.
        queue->completed = first + count;
        queue->entries = entries + mlx5::count_bits(writing);
        if (writing != 0) queue->covered = first + mlx5::highest(writing) + 1;
    }
    group.sync();
    if ((writing >> lane & 1) != 0) {
        const uint64_t number = entries + mlx5::count_bits(writing & mlx5::below(lane));
        store_entry(*context, *queue, number, position, flight, 0, 0);
    }
    context->progress = true;
    if (changed != kNever) {
        if (lane == 0) {
            violate(context, queue, changed, kSlotReused);
            if (!context->strict) queue->covered = changed + 1;  // said once
        }
        group.sync();
        return !context->strict;
    }
    if (failing != 0) {
        const uint8_t syndrome = group.at(flight->syndrome, failed);
        const uint8_t vendor = group.at(flight->vendor, failed);
        if (lane == 0) fail(context, queue, syndrome, vendor);
        group.sync();
        return false;
    }
    return count == width;
}

template <class Group>
EPCOMM_HD inline void complete(Group group, Context* context, QueuePair* queue) {
    while (queue->completed != queue->fetched && complete_window(group, context, queue)) {
    }
}

}  // namespace epcomm::emulated
