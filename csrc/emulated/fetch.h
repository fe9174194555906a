// From the doorbell to a scheduled request. What takes no group is done by one lane.
#pragma once

#include "complete.h"

namespace epcomm::emulated {

/// For what is read after it.
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
    // The doorbell was acquired. All loads first, so that they wait together.
    const uint32_t* const words = &queue.record[0].raw;
    const auto* quoted =
        reinterpret_cast<const uint64_t*>(&queue.ring[rung.last & (queue.num_blocks - 1)]);
    const mlx5::Be32 send{fabric::load_relaxed(&words[mlx5::kSendRecord])};
    const uint32_t receive = fabric::load_relaxed(&words[mlx5::kReceiveRecord]);
    const uint64_t request = fabric::load_relaxed(quoted);
    const uint32_t record = send.raw;
    if (receive != 0) return kReceiveRecord;
    if (record > 0xffff) return kRecordWrong;
    if (uint16_t(record - rung.next) > mlx5::kMaxBlocks) return kRecordBehind;
    if (uint16_t(record - uint16_t(queue.covered)) > queue.num_blocks) return kRecordWrong;
    if (!rung.names_a_request) return kNoViolation;
    // The request it quotes must be the one that lies there.
    mlx5::Be32 control[2];
    memcpy(control, &request, sizeof control);
    return control[0] == rung.words[0] && control[1] == rung.words[1] ? kNoViolation
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

/// What the record says in place of a doorbell that was lost.
EPCOMM_COLD inline void recover(Context* context, QueuePair* queue) {
    queue->recover_at = kNever;
    context->note(EventKind::kRecovered, *queue, queue->posted, 0);
    const uint16_t next = uint16_t(load_record(*queue, mlx5::kSendRecord));
    if (const Violation wrong = judge_index(*queue, next)) {
        violate(context, queue, queue->posted, wrong);
    } else {
        post_until(context, queue, next);
    }
}

/// `word` is what the doorbell holds, acquired.
EPCOMM_HD inline void look_at_doorbell(Context* context, QueuePair* queue, uint64_t word) {
    if (word != queue->doorbell_seen) {
        queue->doorbell_seen = word;
        context->progress = true;
        take_doorbell(context, queue, parse_doorbell(word));
    }
    if (queue->recover_at != kNever && context->is_due(queue->recover_at)) recover(context, queue);
}

EPCOMM_HD inline void refuse(QueuePair* queue, Flight* flight, uint8_t syndrome, uint8_t vendor) {
    flight->syndrome = syndrome;
    flight->vendor = vendor;
    queue->refused = 1;
}

/// The peer gives no answer: found out after the retries.
EPCOMM_COLD inline void give_up(const Context& context, QueuePair* queue, Flight* flight) {
    refuse(queue, flight, mlx5::kRetryExceeded, kVendorRetry);
    flight->times.complete = flight->times.depart + context.own().line.retry_ns * kNanosecond;
}

/// An NIC serves its queue pairs in turn: one that scheduled all it has at once would keep the port
/// from the others. So nobody is further ahead of time than this.
constexpr Picoseconds kAhead = 4000 * kNanosecond;

/// What leaves with the request before it, however long that is: a packet. Cards give the port to
/// their queue pairs in turns that are much shorter than a long message. Here a message has one
/// turn, and a signal behind it must not wait for all of a message of every other queue pair.
EPCOMM_HD inline bool is_short(const LineModel& line, const Request& request) {
    return request.opcode != mlx5::kRdmaRead && request.bytes <= line.packet_bytes;
}

/// Read a request from the ring.
EPCOMM_HD inline mlx5::Block load_request(const QueuePair& queue, uint64_t position) {
    const auto* from =
        reinterpret_cast<const uint64_t*>(&queue.ring[position & (queue.num_blocks - 1)]);
    uint64_t words[mlx5::kBlockBytes / 8];
    for (uint32_t i = 0; i < mlx5::kBlockBytes / 8; ++i) words[i] = fabric::load_relaxed(&from[i]);
    mlx5::Block block;
    memcpy(&block, words, sizeof block);
    return block;
}

/// The same of a request that is posted and not read yet. By one lane.
EPCOMM_HD inline bool next_is_short(const Context& context, QueuePair* queue, uint64_t position) {
    if (position < queue->long_until) return false;
    Request request;
    parse(load_request(*queue, position), queue->number, uint16_t(position), &request);
    if (is_short(context.own().line, request)) return true;
    queue->long_until = position + 1;
    return false;
}

/// How many requests may be read now, at most `width`. What keeps the first from it is looked at
/// alone, what keeps others behind it in `num_together`.
EPCOMM_HD inline uint32_t num_due(Context* context, QueuePair* queue, uint32_t width) {
    const uint64_t position = queue->fetched, left = queue->posted - position;
    const uint64_t room = queue->num_flights - (position - queue->oldest());
    // Behind a failed request nothing is started.
    if (left == 0 || room == 0 || queue->refused != 0) return 0;
    if (position >= queue->early_until && queue->departed > context->now + kAhead &&
        !next_is_short(*context, queue, position)) {
        context->wake_at(queue->departed - kAhead);
        return 0;
    }
    Picoseconds amount;
    if (queue->late_judged <= position) {
        queue->late_judged = position + 1;
        queue->late_until =
            context->hits(kLateFetch, *queue, position, &amount) ? context->now + amount : 0;
    }
    if (!context->is_due(queue->late_until)) return 0;
    if (context->hits(kKillQueue, *queue, position, &amount)) {
        fail(context, queue, 0, 0);
        return 0;
    }
    if (left < width) width = uint32_t(left);
    return room < width ? uint32_t(room) : width;
}

/// Local key, bounds and permission.
EPCOMM_HD inline bool local_is_allowed(const Context& context, const QueuePair& queue,
                                       const Request& request) {
    if (request.opcode == mlx5::kNop || request.inlined) return true;
    return allows(find_key(context.wire->keys(context.nic), request.local_key), queue.domain,
                  request.has_response() ? uint32_t(kLocalWrite) : 0, request.local_address,
                  request.bytes);
}

/// How many of the requests that the first `count` lanes have read can be scheduled together: as if
/// one after the other.
template <class Group>
EPCOMM_HD inline uint32_t num_together(Group group, const LineModel& line, const QueuePair& queue,
                                       uint32_t count, const Request& request, bool wrong) {
    if (count == 1) return 1;
    const uint32_t lane = group.lane(), lower = mlx5::below(lane);
    const bool mine = lane < count;
    const bool is_read = mine && request.opcode == mlx5::kRdmaRead;
    const uint32_t failing = group.ballot(mine && wrong), reads = group.ballot(is_read);
    const uint32_t responses = group.ballot(mine && request.has_response());
    const Picoseconds before =
        mlx5::sum_before(group, count, mine ? duration(line, request.bytes) : Picoseconds(0));
    // Behind a failed request nothing is started; a read takes the line both ways; nobody waits for
    // an answer to what was scheduled with it.
    const bool joins =
        mine && (failing & lower) == 0 && (reads & lower) == 0 && !is_read &&
        !(request.is_fenced() && (responses & lower) != 0) &&
        !(request.has_response() && mlx5::count_bits(responses & lower) >= queue.max_responses) &&
        (before <= kAhead || is_short(line, request));
    return mlx5::leading(group, lane == 0 || joins);
}

/// What the faults do to the one request that is scheduled.
EPCOMM_COLD inline void disturb(Context* context, QueuePair* queue, uint64_t position) {
    Flight* flight = &queue->flight(position);
    const Request& request = flight->request;
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
        queue->passes = 1;
    }
    if (context->hits(kLateCompletion, *queue, position, &amount)) flight->times.complete += amount;
    if (context->hits(kEarlyCompletion, *queue, position, &amount)) flight->completes_early = 1;
    if (context->hits(kBadKey, *queue, position, &amount)) {
        refuse(queue, flight, mlx5::kRemoteAccess, kVendorRemoteAccess);
    }
    if (context->hits(kRetryExceeded, *queue, position, &amount)) give_up(*context, queue, flight);
}

/// When the line is taken by the requests of the first `count` lanes, whose flights are stored.
template <class Group>
EPCOMM_HD inline void schedule_flights(Group group, Context* context, QueuePair* queue,
                                       uint64_t position, uint32_t count, const Ends& ends,
                                       const Request& request) {
    Flight* flight = &queue->flight(position);
    const uint32_t lane = group.lane();
    const bool goes = lane < count && flight->syndrome == 0;
    const bool waits = goes && request.has_response();
    const uint32_t responses = group.ballot(waits);
    Picoseconds earliest = queue->posted_at + ends.line.fetch_ns * kNanosecond;
    const uint32_t slot = queue->next_response + mlx5::count_bits(responses & mlx5::below(lane));
    Picoseconds* response = &queue->responses[slot % queue->max_responses];
    if (goes && request.is_fenced() && queue->last_response > earliest) {
        earliest = queue->last_response;
    }
    if (waits && *response > earliest) earliest = *response;
    const bool is_message = goes && request.opcode != mlx5::kNop;
    const bool is_read = is_message && request.opcode == mlx5::kRdmaRead;
    const uint32_t messages = group.ballot(is_message);
    const Schedule times =
        schedule(group, ends, is_message, context->now, earliest, request.bytes, is_read);
    if (goes) {
        flight->times = is_message ? times : Schedule{earliest, earliest, earliest};
        flight->last_piece = flight->times.arrive;
        if (context->faults.num_rules != 0) disturb(context, queue, position);
    }
    group.sync();
    // The last one is the latest.
    if (messages != 0 && lane == mlx5::highest(messages)) queue->departed = times.depart;
    if (waits) *response = flight->times.complete;
    if (waits && lane == mlx5::highest(responses)) {
        queue->next_response = (slot + 1) % queue->max_responses;
        if (*response > queue->last_response) queue->last_response = *response;
    }
}

EPCOMM_HD inline void start_flight(const Context& context, Flight* flight, const Request& request) {
    *flight = {};
    flight->request = request;
    flight->read_at = kNever;
    flight->times = {context.now, context.now, context.now};
}

/// `wrong`: with the request itself; else with its memory.
EPCOMM_COLD inline void refuse_locally(Context* context, QueuePair* queue, uint64_t position,
                                       Violation wrong) {
    Flight* flight = &queue->flight(position);
    if (wrong == kNoViolation) return refuse(queue, flight, mlx5::kLocalProtection, 0);
    context->note(EventKind::kViolation, *queue, position, wrong);
    refuse(queue, flight, mlx5::kLocalOperation, kVendorMalformed);
}

/// Read, check and schedule the next requests, at most `count`.
template <class Group>
EPCOMM_HD inline void fetch_some(Group group, Context* context, QueuePair* queue, uint32_t count) {
    const uint64_t first = queue->fetched, position = first + group.lane();
    const bool mine = group.lane() < count;
    mlx5::Block block{};
    Request request{};
    Violation wrong = kNoViolation;
    bool refused = false;
    if (mine) block = load_request(*queue, position);
    const Ends ends = look_at_ends(&context->own(), &context->wire->nic(queue->peer_nic));
    if (mine) {
        wrong = parse(block, queue->number, uint16_t(position), &request);
        refused = wrong != kNoViolation || !local_is_allowed(*context, *queue, request);
    }
    count = num_together(group, ends.line, *queue, count, request, refused);
    const bool joins = group.lane() < count;
    if (joins) {
        start_flight(*context, &queue->flight(position), request);
        queue->shadow[position & (queue->num_blocks - 1)] = block;
    }
    if (joins && refused) refuse_locally(context, queue, position, wrong);
    schedule_flights(group, context, queue, position, count, ends, request);
    group.sync();
    if (group.lane() == 0) queue->fetched = first + count;
    context->progress = true;
    group.sync();
}

template <class Group>
EPCOMM_HD inline void fetch(Group group, Context* context, QueuePair* queue) {
    while (true) {
        const bool is_over = queue->fetched == queue->posted;
        group.sync();  // before the first lane changes them
        if (is_over) return;
        uint32_t count = 0;
        if (group.lane() == 0) count = num_due(context, queue, context->width(group));
        count = group.from_first(count);
        if (count == 0) return;
        fetch_some(group, context, queue, count);
    }
}

}  // namespace epcomm::emulated
