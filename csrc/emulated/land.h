// What a request does at the peer: bytes placed, words changed, or the reason why not.
//
// The engine brings the copier: `copier.copy(to, from, bytes)` and `copier.finish(context, bytes)`,
// the time at which a copy that starts now is done.
#pragma once

#include "fetch.h"

namespace epcomm::emulated {

/// Until a word that an atomic operation read is written back. The processors' atomics on that word
/// are not excluded meanwhile, only those of the same NIC: as on hardware without PCIe atomics.
constexpr Picoseconds kAtomicGap = 20 * kNanosecond;

/// The last bytes of a message, which come with its arrival and never before; all of a short one.
constexpr uint32_t kTailBytes = 64;

/// What the responder finds wrong with a request.
EPCOMM_HD inline uint8_t judge_remote(const Context& context, const QueuePair& queue,
                                      const Request& request) {
    if (request.opcode == mlx5::kNop) return 0;
    Nic& peer = context.wire->nic(queue.entry->peer_nic);
    if (request.is_atomic() && request.remote_address % 8 != 0) return mlx5::kRemoteInvalid;
    const uint32_t access = request.is_atomic()                 ? kRemoteAtomic
                            : request.opcode == mlx5::kRdmaRead ? kRemoteRead
                                                                : kRemoteWrite;
    const uint32_t domain = find_queue(peer, queue.entry->peer_number)->domain;
    return allows(find_key(peer, request.remote_key), domain, access, request.remote_address,
                  request.bytes)
               ? 0
               : mlx5::kRemoteAccess;
}

struct Placement {
    uint8_t* to;
    const uint8_t* from;
};

EPCOMM_HD inline Placement placement_of(const Context& context, QueuePair* queue, uint64_t position,
                                        const Request& request) {
    auto* local = reinterpret_cast<uint8_t*>(request.local_address);
    uint8_t* remote =
        context.wire->reach(queue->entry->peer_nic, request.remote_key, request.remote_address);
    if (request.opcode == mlx5::kRdmaRead) return {local, remote};
    if (request.inlined) {
        local = reinterpret_cast<uint8_t*>(&queue->shadow[position & (queue->num_blocks - 1)]);
        local += 2 * mlx5::kUnitBytes + sizeof(mlx5::InlineHeader);
    }
    return {remote, local};
}

EPCOMM_HD inline uint32_t greatest_common_divisor(uint32_t a, uint32_t b) {
    while (b != 0) {
        const uint32_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

/// The i-th piece in a scrambled order: a step that has no common divisor with their number visits
/// each once.
EPCOMM_HD inline uint32_t piece_at(const Context& context, const QueuePair& queue,
                                   uint64_t position, uint32_t i, uint32_t num_pieces) {
    const uint64_t draw = mix(mix(context.faults.seed, queue.number), position);
    uint32_t step = uint32_t(draw % num_pieces) | 1;
    while (greatest_common_divisor(step, num_pieces) != 1) step += 2;
    return uint32_t((uint64_t(i) * step + draw / 7) % num_pieces);
}

/// Place one piece; the last one not before its time. Whether all are placed.
template <class Copier>
EPCOMM_HD inline bool place_pieces(Context* context, QueuePair* queue, uint64_t position,
                                   Flight* flight, Copier& copier) {
    const bool last = flight->pieces_placed + 1 == flight->num_pieces;
    if (!context->is_due(last ? flight->last_piece : flight->times.depart)) return false;
    const uint32_t bytes = flight->request.bytes;
    const uint32_t size = (bytes + flight->num_pieces - 1) / flight->num_pieces;
    const uint32_t piece =
        piece_at(*context, *queue, position, flight->pieces_placed, flight->num_pieces);
    const uint64_t offset = uint64_t(piece) * size;
    if (offset < bytes) {
        const Placement place = placement_of(*context, queue, position, flight->request);
        const uint64_t left = bytes - offset;
        copier.copy(place.to + offset, place.from + offset, left < size ? left : size);
    }
    flight->pieces_placed += 1;
    context->progress = true;
    if (last) flight->copied_at = copier.finish(context, 0);
    return last;
}

/// Place the body as soon as possible, the tail at arrival. Whether all is placed.
template <class Copier>
EPCOMM_HD inline bool place_whole(Context* context, QueuePair* queue, uint64_t position,
                                  Flight* flight, Copier& copier) {
    const uint64_t bytes = flight->request.bytes;
    const uint64_t tail = bytes < kTailBytes ? bytes : kTailBytes;
    const Placement place = placement_of(*context, queue, position, flight->request);
    if (flight->copied_at == 0) {
        if (!context->is_due(flight->times.depart)) return false;
        copier.copy(place.to, place.from, bytes - tail);
        flight->copied_at = copier.finish(context, bytes);
        context->progress = true;
    }
    const bool is_copied = context->is_due(flight->copied_at);
    if (!context->is_due(flight->last_piece) || !is_copied) return false;
    copier.copy(place.to + bytes - tail, place.from + bytes - tail, tail);
    return true;
}

/// Read, wait, write, while no other atomic of the peer's NIC is under way. Whether it is done.
EPCOMM_HD inline bool run_atomic(Context* context, QueuePair* queue, Flight* flight) {
    Nic& peer = context->wire->nic(queue->entry->peer_nic);
    auto* word = reinterpret_cast<uint64_t*>(context->wire->reach(
        queue->entry->peer_nic, flight->request.remote_key, flight->request.remote_address));
    if (flight->read_at == kNever) {
        if (!context->is_due(flight->last_piece)) return false;
        if (!mlx5::exchange_if(&peer.atomics, 0, 1)) {
            context->is_due(context->now + kAtomicGap);  // look again then
            return false;
        }
        flight->old_value = fabric::load_acquire(word);
        flight->read_at = context->now;
        context->progress = true;
    }
    if (!context->is_due(flight->read_at + kAtomicGap)) return false;
    uint64_t value = flight->old_value + flight->request.operand;
    if (flight->request.opcode == mlx5::kAtomicCompareSwap) {
        value = flight->old_value == flight->request.compare ? flight->request.operand
                                                             : flight->old_value;
    }
    fabric::store_release(word, value);  // after all that landed before
    fabric::store_release(&peer.atomics, uint64_t(0));
    flight->copied_at = context->now;
    return true;
}

/// Take a request as far as it goes now. Whether it has landed or failed.
template <class Copier>
EPCOMM_HD inline bool land_one(Context* context, QueuePair* queue, uint64_t position,
                               Copier& copier) {
    Flight& flight = queue->flight(position);
    if (flight.landed || flight.syndrome != 0) return true;
    const Request& request = flight.request;
    if (flight.copied_at == 0 && flight.pieces_placed == 0 && flight.read_at == kNever) {
        if (!peer_answers(*context, *queue)) {
            const Picoseconds retries = context->own().line.retry_ns * kNanosecond;
            if (!context->is_due(flight.times.depart + retries)) {
                context->is_due(context->now + retries / 8);  // it is sent again
                return false;
            }
            give_up(*context, &flight);
            return true;
        }
        if (const uint8_t syndrome = judge_remote(*context, *queue, request)) {
            refuse(&flight, syndrome, syndrome == mlx5::kRemoteAccess ? kVendorRemoteAccess : 0);
            return true;
        }
    }
    bool placed;
    if (request.opcode == mlx5::kNop) {
        placed = context->is_due(flight.times.arrive);
    } else if (request.is_atomic()) {
        placed = run_atomic(context, queue, &flight);
    } else if (flight.num_pieces > 1) {
        placed = place_pieces(context, queue, position, &flight, copier);
    } else {
        placed = place_whole(context, queue, position, &flight, copier);
    }
    if (!placed) return false;
    flight.landed = 1;
    context->progress = true;
    // The later of model and copier, for the acknowledgement too.
    if (flight.copied_at > flight.times.arrive) {
        const Picoseconds back = flight.times.complete - flight.times.arrive;
        if (flight.num_pieces <= 1) flight.times.complete = flight.copied_at + back;
    }
    if (request.opcode != mlx5::kNop) copier.landed(*context, flight);
    return true;
}

/// Land in order; only relaxed requests pass others that have not landed, none passes a failed one.
template <class Copier>
EPCOMM_HD inline void land(Context* context, QueuePair* queue, Copier& copier) {
    bool in_order = true;
    for (uint64_t position = queue->landed; position != queue->fetched; ++position) {
        Flight& flight = queue->flight(position);
        const bool over =
            (in_order || flight.relaxed) && land_one(context, queue, position, copier);
        if (flight.syndrome != 0) return;
        in_order = in_order && over;
        if (in_order) queue->landed = position + 1;
    }
}

}  // namespace epcomm::emulated
