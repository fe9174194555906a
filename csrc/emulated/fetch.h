// From the doorbell to a scheduled request.
#pragma once

#include "complete.h"

namespace epcomm::emulated {

EPCOMM_HD inline uint32_t load_record(const QueuePair& queue, int word) {
    const mlx5::Be32 value{fabric::load_acquire(&queue.record[word].raw)};
    return value.raw;  // both conversions: memory is big-endian, and so is `raw`
}

/// Whether `next` can be the end of what is posted.
EPCOMM_HD inline Violation judge_index(const QueuePair& queue, uint16_t next) {
    const uint16_t advance = uint16_t(next - uint16_t(queue.posted));
    if (advance > mlx5::kMaxBlocks) return kDoorbellBackwards;
    return queue.posted + advance - queue.covered > queue.num_blocks ? kQueueOverflow
                                                                     : kNoViolation;
}

/// Take over `next` as the end of what was posted, whether a doorbell or the record says so.
EPCOMM_HD inline void post_until(Context* context, QueuePair* queue, uint16_t next) {
    const uint16_t advance = uint16_t(next - uint16_t(queue->posted));
    if (advance == 0) return;
    queue->posted += advance;
    queue->posted_at = context->now;
    context->progress = true;
    Picoseconds amount;
    if (context->hits(kEarlyFetch, *queue, queue->posted - advance, &amount)) {
        queue->early_until = queue->posted;
    }
}

/// Doorbells that name no requests that could be fetched.
EPCOMM_HD inline Violation judge_doorbell(const QueuePair& queue, const Rung& rung) {
    return rung.number != queue.number ? kDoorbellQueueNumber : judge_index(queue, rung.next);
}

/// Mistakes that hardware does not see, or sees too late. The record must already hold the
/// doorbell's index, or one that a later doorbell will bring.
EPCOMM_HD inline Violation judge_record(const QueuePair& queue, const Rung& rung) {
    const uint32_t record = load_record(queue, mlx5::kSendRecord);
    if (load_record(queue, mlx5::kReceiveRecord) != 0) return kReceiveRecord;
    if (record > 0xffff) return kRecordWrong;
    if (uint16_t(record - rung.next) > mlx5::kMaxBlocks) return kRecordBehind;
    if (uint16_t(record - uint16_t(queue.covered)) > queue.num_blocks) return kRecordWrong;
    if (!rung.names_a_request) return kNoViolation;
    // The request it quotes must be the one that lies there.
    mlx5::Control control;
    memcpy(&control, &queue.ring[rung.last & (queue.num_blocks - 1)], sizeof control);
    return control.operation == rung.words[0] && control.queue_pair == rung.words[1]
               ? kNoViolation
               : kDoorbellRequest;
}

EPCOMM_HD inline void take_doorbell(Context* context, QueuePair* queue, const Rung& rung) {
    if (const Violation wrong = judge_doorbell(*queue, rung)) {
        return violate(context, queue, queue->posted, wrong);
    }
    if (const Violation wrong = judge_record(*queue, rung)) {
        violate(context, queue, queue->posted, wrong);
        if (context->strict) return;
    }
    Picoseconds amount;
    if (context->hits(kLostDoorbell, *queue, queue->posted, &amount)) {
        queue->recover_at = context->now + amount;
    } else {
        post_until(context, queue, rung.next);
    }
}

EPCOMM_HD inline void look_at_doorbell(Context* context, QueuePair* queue) {
    const uint64_t word = fabric::load_acquire(queue->doorbell);
    if (word != queue->doorbell_seen) {
        queue->doorbell_seen = word;
        context->progress = true;
        take_doorbell(context, queue, parse_doorbell(word));
    }
    if (queue->recover_at != kNever && context->is_due(queue->recover_at)) {
        queue->recover_at = kNever;
        context->note(EventKind::kRecovered, *queue, queue->posted, 0);
        const uint16_t next = uint16_t(load_record(*queue, mlx5::kSendRecord));
        if (const Violation wrong = judge_index(*queue, next)) {
            violate(context, queue, queue->posted, wrong);
        } else {
            post_until(context, queue, next);
        }
    }
}

/// Local key, bounds and permission.
EPCOMM_HD inline bool local_is_allowed(const Context& context, const QueuePair& queue,
                                       const Request& request) {
    if (request.opcode == mlx5::kNop || request.inlined) return true;
    return allows(find_key(context.own(), request.local_key), queue.entry->domain,
                  request.has_response() ? uint32_t(kLocalWrite) : 0, request.local_address,
                  request.bytes);
}

/// Whether the peer's NIC and queue pair answer.
EPCOMM_HD inline bool peer_answers(const Context& context, const QueuePair& queue) {
    Nic& peer = context.wire->nic(queue.entry->peer_nic);
    const QueueEntry* other = find_queue(peer, queue.entry->peer_number);
    return fabric::load_acquire(&peer.dead) == 0 && other != nullptr &&
           fabric::load_acquire(&other->state) == kReady && other->peer_nic == context.nic &&
           other->peer_number == queue.number;
}

EPCOMM_HD inline void refuse(Flight* flight, uint8_t syndrome, uint8_t vendor) {
    flight->syndrome = syndrome;
    flight->vendor = vendor;
}

/// The peer gives no answer: found out after the retries.
EPCOMM_HD inline void give_up(const Context& context, Flight* flight) {
    refuse(flight, mlx5::kRetryExceeded, kVendorRetry);
    flight->times.complete = flight->times.depart + context.own().line.retry_ns * kNanosecond;
}

/// When the line is taken, and what the faults do to it.
EPCOMM_HD inline void schedule_flight(Context* context, QueuePair* queue, uint64_t position,
                                      Flight* flight) {
    const Request& request = flight->request;
    Nic* own = &context->own();
    Picoseconds earliest = queue->posted_at + own->line.fetch_ns * kNanosecond;
    if (request.is_fenced() && queue->last_response > earliest) earliest = queue->last_response;
    Picoseconds* response = &queue->responses[queue->num_responses % queue->max_responses];
    if (request.has_response() && *response > earliest) earliest = *response;
    if (request.opcode == mlx5::kNop) {
        flight->times = {earliest, earliest, earliest};
    } else {
        Nic* peer = &context->wire->nic(queue->entry->peer_nic);
        flight->times =
            schedule(own, peer, earliest, request.bytes, request.opcode == mlx5::kRdmaRead);
    }
    queue->departed = flight->times.depart;

    Picoseconds amount;
    if (context->hits(kDelay, *queue, position, &amount)) {
        flight->times.arrive += amount;
        flight->times.complete += amount;
    }
    flight->last_piece = flight->times.arrive;
    if (request.bytes > 256 && !request.inlined &&
        context->hits(kPieces, *queue, position, &amount)) {
        const uint64_t draw = mix(context->faults.seed, mix(queue->number, position));
        const uint32_t size = 256u << draw % 5;
        flight->num_pieces = (request.bytes + size - 1) / size;
        flight->last_piece += amount;
        flight->times.complete += amount;
    }
    if ((request.is_atomic() || request.bytes <= mlx5::kMaxInline) &&
        context->hits(kRelaxed, *queue, position, &amount)) {
        flight->relaxed = 1;
    }
    if (context->hits(kLateCompletion, *queue, position, &amount)) flight->times.complete += amount;
    if (context->hits(kEarlyCompletion, *queue, position, &amount)) flight->completes_early = 1;
    if (context->hits(kBadKey, *queue, position, &amount)) {
        refuse(flight, mlx5::kRemoteAccess, kVendorRemoteAccess);
    }
    if (context->hits(kRetryExceeded, *queue, position, &amount)) give_up(*context, flight);
    if (request.has_response()) {
        *response = flight->times.complete;
        queue->num_responses += 1;
        if (*response > queue->last_response) queue->last_response = *response;
    }
}

/// Read one request from the ring.
EPCOMM_HD inline void fetch_one(Context* context, QueuePair* queue) {
    const uint64_t position = queue->fetched;
    Flight* flight = &queue->flight(position);
    mlx5::Block* shadow = &queue->shadow[position & (queue->num_blocks - 1)];
    *flight = Flight{};
    flight->read_at = kNever;
    const auto* from =
        reinterpret_cast<const uint64_t*>(&queue->ring[position & (queue->num_blocks - 1)]);
    for (uint32_t i = 0; i < mlx5::kBlockBytes / 8; ++i) {
        const uint64_t word = fabric::load_relaxed(&from[i]);
        memcpy(reinterpret_cast<uint8_t*>(shadow) + 8 * i, &word, 8);
    }
    queue->fetched += 1;
    context->progress = true;
    flight->times = {context->now, context->now, context->now};
    const Violation wrong = parse(*shadow, queue->number, uint16_t(position), &flight->request);
    if (wrong != kNoViolation) {
        context->note(EventKind::kViolation, *queue, position, wrong);
        refuse(flight, mlx5::kLocalOperation, kVendorMalformed);
    } else if (!local_is_allowed(*context, *queue, flight->request)) {
        refuse(flight, mlx5::kLocalProtection, 0);
    } else {
        schedule_flight(context, queue, position, flight);
    }
}

/// Whether the next request may be read now. An NIC serves its queue pairs in turn: one that
/// scheduled all it has at once would keep the port from the others.
EPCOMM_HD inline bool fetch_is_due(Context* context, QueuePair* queue) {
    constexpr Picoseconds kAhead = 4000 * kNanosecond;
    const uint64_t position = queue->fetched;
    if (position - queue->landed >= queue->num_blocks) return false;
    if (position >= queue->early_until && queue->departed > kAhead &&
        !context->is_due(queue->departed - kAhead)) {
        return false;
    }
    if (queue->late_judged <= position) {
        queue->late_judged = position + 1;
        Picoseconds amount;
        queue->late_until =
            context->hits(kLateFetch, *queue, position, &amount) ? context->now + amount : 0;
    }
    if (!context->is_due(queue->late_until)) return false;
    // Behind a failed request nothing is started.
    return position == queue->completed || queue->flight(position - 1).syndrome == 0;
}

EPCOMM_HD inline void fetch(Context* context, QueuePair* queue) {
    while (queue->fetched != queue->posted && fetch_is_due(context, queue)) {
        Picoseconds amount;
        if (context->hits(kKillQueue, *queue, queue->fetched, &amount)) {
            return fail(context, queue, 0, 0);
        }
        fetch_one(context, queue);
    }
}

}  // namespace epcomm::emulated
