// Completions and the error state.
#pragma once

#include "queue_pair.h"

namespace epcomm::emulated {

/// Write an entry; the last 8 bytes, with index and owner bit, are released after the others.
EPCOMM_HD inline void write_completion(const Context& context, QueuePair* queue, uint64_t position,
                                       const Flight* flight, uint8_t syndrome, uint8_t vendor) {
    const uint8_t owner =
        (queue->entries & queue->num_completions) != 0 ? mlx5::kOwnerBit : uint8_t(0);
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
    entry.good.queue_pair = opcode << 24 | queue->number;
    entry.good.index = uint16_t(position);
    entry.good.opcode_owner = uint8_t(kind << 4 | owner);
    auto* slot = reinterpret_cast<uint64_t*>(
        &queue->completions[queue->entries & (queue->num_completions - 1)]);
    for (int i = 0; i < 7; ++i) slot[i] = entry.words[i];
    // Counted before software can see it: what it does next must not look like an overflow.
    queue->entries += 1;
    queue->covered = position + 1;
    fabric::store_release(&slot[7], entry.words[7]);
}

/// An atomic that read its word and will not write it any more lets others go on.
EPCOMM_HD inline void let_go_of_atomics(const Context& context, QueuePair* queue) {
    for (uint64_t position = queue->landed; position != queue->fetched; ++position) {
        Flight& flight = queue->flight(position);
        if (!flight.request.is_atomic() || flight.landed || flight.read_at == kNever) continue;
        flight.read_at = kNever;
        fabric::store_release(&context.wire->nic(queue->entry->peer_nic).atomics, uint64_t(0));
    }
}

/// In the error state every request, asked for or not, completes as flushed, also later ones.
EPCOMM_HD inline void flush_all(Context* context, QueuePair* queue) {
    for (; queue->completed != queue->posted; ++queue->completed) {
        write_completion(*context, queue, queue->completed, nullptr, mlx5::kFlushed,
                         kVendorFlushed);
        context->progress = true;
    }
    queue->fetched = queue->landed = queue->posted;
}

/// The first request that is not complete fails with `syndrome` (0: none of them is to blame), what
/// is behind it is flushed.
EPCOMM_HD inline void fail(Context* context, QueuePair* queue, uint8_t syndrome, uint8_t vendor) {
    context->progress = true;
    context->note(EventKind::kFailed, *queue, queue->completed,
                  syndrome == 0 ? uint8_t(mlx5::kFlushed) : syndrome);
    fabric::store_release(&queue->entry->state, uint32_t(kFailed));
    let_go_of_atomics(*context, queue);
    if (syndrome != 0) {
        const uint64_t position = queue->completed;
        const bool known = position < queue->fetched;
        write_completion(*context, queue, position, known ? &queue->flight(position) : nullptr,
                         syndrome, vendor);
        if (queue->completed != queue->posted) queue->completed += 1;
    }
    flush_all(context, queue);
}

/// A rule of the interface was broken.
EPCOMM_HD inline void violate(Context* context, QueuePair* queue, uint64_t position,
                              Violation what) {
    context->note(EventKind::kViolation, *queue, position, what);
    if (context->strict && queue->entry->state != kFailed) {
        fail(context, queue, mlx5::kLocalOperation, uint8_t(kVendorViolation + what));
    }
}

/// Requests whose slots software may reuse once this completion is written must be what they were
/// when they were fetched: else it reused them before.
EPCOMM_HD inline bool slots_are_unchanged(Context* context, QueuePair* queue, uint64_t end) {
    for (uint64_t position = queue->covered; position != end; ++position) {
        const uint32_t slot = uint32_t(position & (queue->num_blocks - 1));
        const auto* now = reinterpret_cast<const uint64_t*>(&queue->ring[slot]);
        const auto* then = reinterpret_cast<const uint64_t*>(&queue->shadow[slot]);
        for (uint32_t i = 0; i < mlx5::kBlockBytes / 8; ++i) {
            if (fabric::load_relaxed(&now[i]) == then[i]) continue;
            violate(context, queue, position, kSlotReused);
            return false;
        }
    }
    return true;
}

/// Complete what is due, in order.
EPCOMM_HD inline void complete(Context* context, QueuePair* queue) {
    while (queue->completed != queue->fetched) {
        const uint64_t position = queue->completed;
        Flight& flight = queue->flight(position);
        if (!flight.completes_early) {
            if (!flight.landed && flight.syndrome == 0) return;
            if (!context->is_due(flight.times.complete)) return;
        }
        context->progress = true;
        if (flight.syndrome != 0) {
            fail(context, queue, flight.syndrome, flight.vendor);
            return;
        }
        if (flight.request.is_atomic()) {
            memcpy(reinterpret_cast<void*>(flight.request.local_address), &flight.old_value, 8);
        }
        const bool asked = flight.request.asks_completion();
        if (asked && !slots_are_unchanged(context, queue, position + 1)) return;
        queue->completed += 1;
        if (asked) write_completion(*context, queue, position, &flight, 0, 0);
    }
}

}  // namespace epcomm::emulated
