// What a request does at the peer: bytes placed, words changed, or the reason why not.
//
// The engine brings the copier. Its calls with a group are made by all lanes:
//
//     start(group, wants, position, body)
//                                how many of its bytes are on their way now, from the first on
//     started(context, bytes)    a message's whole body is; when it will be placed, 0 if not known
//     placed(context, position)  then: when all of it had been placed, 0 if it is not yet
//     settle(group, needed)      if it is for any lane: what other threads placed is visible before
//                                what follows
//     place(to, from, bytes)     at once; aligned to 8 bytes or not
//     landed(context, queue, position, flight)
//                                for the account
//     refresh(group, context)    the time, again
//     placer()                   what `start` needs of it, by value: for calls that are not inlined
//     kWindow                    at most so many requests are between `started` and `landed`
//     kCopiesAhead               it may be given long bodies before they depart (copy_ahead)
#pragma once

#include "overlap.h"

namespace epcomm::emulated {

/// Until a word that an atomic operation read is written back. The processors' atomics on that word
/// are not excluded meanwhile, only those of the same NIC: as on hardware without PCIe atomics.
constexpr Picoseconds kAtomicGap = 20 * kNanosecond;

/// Who holds an NIC's atomics for so long is gone.
constexpr uint64_t kLongestHoldNs = 1'000'000'000;

/// Until the copier is asked again to take a body that need not be copied yet.
constexpr Picoseconds kCopyAgain = 4000 * kNanosecond;

/// The other end of a queue pair, and a request's key there.
struct PeerView {
    bool answers;
    uint32_t domain;
    Key key;
};

EPCOMM_HD inline PeerView look_at_peer(const Context& context, const QueuePair& queue,
                                       uint32_t remote_key) {
    const Nic& peer = context.wire->nic(queue.peer_nic);
    const uint32_t slot = queue.peer_number - kFirstQueue;
    const QueueEntry* other = &peer.queues[slot < kMaxQueues ? slot : 0];
    // All loads first: they are far away.
    const uint32_t dead = fabric::load_relaxed(&peer.dead);
    const uint32_t count = fabric::load_relaxed(&peer.num_queues);
    const uint32_t state = fabric::load_relaxed(&other->state);
    const uint32_t nic = fabric::load_relaxed(&other->peer_nic);
    const uint32_t number = fabric::load_relaxed(&other->peer_number);
    const uint32_t domain = fabric::load_relaxed(&other->domain);
    const Key key = find_key(context.wire->keys(queue.peer_nic), remote_key);
    return {dead == 0 && slot < count && state == kReady && nic == context.nic &&
                number == queue.number,
            domain, key};
}

/// What the responder finds wrong with a request.
EPCOMM_HD inline uint8_t judge_remote(const PeerView& peer, const Request& request) {
    if (request.opcode == mlx5::kNop) return 0;
    if (request.is_atomic() && request.remote_address % 8 != 0) return mlx5::kRemoteInvalid;
    const uint32_t access = request.is_atomic()                 ? kRemoteAtomic
                            : request.opcode == mlx5::kRdmaRead ? kRemoteRead
                                                                : kRemoteWrite;
    return allows(peer.key, peer.domain, access, request.remote_address, request.bytes)
               ? 0
               : mlx5::kRemoteAccess;
}

struct Placement {
    uint8_t* to;
    const uint8_t* from;
};

/// Bytes for a copier to place.
struct Body {
    uint8_t* to;
    const uint8_t* from;
    uint32_t bytes;
    bool is_ahead;    ///< it has not departed, and need not be taken yet; the same for all lanes
    Picoseconds due;  ///< in the model
};

EPCOMM_HD inline Placement placement_of(const Context& context, const QueuePair& queue,
                                        uint64_t position, const Request& request) {
    uint8_t* remote =
        context.wire->reach(queue.peer_nic, request.remote_key, request.remote_address);
    if (request.inlined) {
        const auto* block =
            reinterpret_cast<const uint8_t*>(&queue.shadow[position & (queue.num_blocks - 1)]);
        return {remote, block + 2 * mlx5::kUnitBytes + sizeof(mlx5::InlineHeader)};
    }
    uint8_t* local = context.wire->reach(context.nic, request.local_key, request.local_address);
    return request.opcode == mlx5::kRdmaRead ? Placement{local, remote} : Placement{remote, local};
}

/// Bytes that are placed at a message's end.
EPCOMM_HD inline uint32_t tail_of(const Request& request) {
    return request.bytes < kTailBytes ? request.bytes : kTailBytes;
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

/// Give the copier the next piece of the request at `position`, which all lanes name. Whether it
/// has taken it.
template <class Group, class Placer>
EPCOMM_COLD bool start_piece(Group group, const Context& context, QueuePair* queue,
                             uint64_t position, Placer placer) {
    Flight* flight = &queue->flight(position);
    const uint32_t bytes = flight->request.bytes, number = flight->pieces_placed;
    const uint32_t size = (bytes + flight->num_pieces - 1) / flight->num_pieces;
    const uint64_t offset =
        uint64_t(piece_at(context, *queue, position, number, flight->num_pieces)) * size;
    const Placement place = placement_of(context, *queue, position, flight->request);
    const uint32_t left = offset < bytes ? bytes - uint32_t(offset) : 0;
    const uint32_t count = left < size ? left : size;
    const Body body{place.to + offset, place.from + offset, count, false, flight->last_piece};
    const uint32_t given = placer.start(group, group.lane() == 0 && count != 0, position, body);
    const bool taken = group.from_first(int(given == count)) != 0;
    group.sync();
    if (taken && group.lane() == 0) flight->pieces_placed = number + 1;
    group.sync();
    return taken;
}

/// All pieces but the last, which comes late.
template <class Group, class Placer>
EPCOMM_COLD bool start_pieces(Group group, const Context& context, QueuePair* queue,
                              uint64_t position, Placer placer) {
    const Flight& flight = queue->flight(position);
    while (flight.pieces_placed + 1 < flight.num_pieces) {
        if (!start_piece(group, context, queue, position, placer)) return false;
    }
    return true;
}

/// What the copier has not been given of a request's bytes, but for the last ones.
EPCOMM_HD inline Body body_of(const Context& context, const QueuePair& queue, uint64_t position,
                              const Flight& flight) {
    const Request& request = flight.request;
    const uint32_t done = flight.body_placed;
    const Placement place = placement_of(context, queue, position, request);
    return {place.to + done, place.from + done, request.bytes - tail_of(request) - done, false,
            flight.times.arrive};
}

/// Give the copier the bodies of the messages of the first `count` lanes; returns how many of them
/// it has taken to their ends.
template <class Group, class Copier>
EPCOMM_HD inline uint32_t start_bodies(Group group, Context* context, QueuePair* queue,
                                       uint64_t position, uint32_t count, Copier& copier) {
    Flight* flight = &queue->flight(position);
    const bool goes = group.lane() < count, moves = goes && copies(flight->request);
    if (group.from_first(int(moves && flight->num_pieces > 1)) != 0) {
        return start_pieces(group, *context, queue, position - group.lane(), copier.placer());
    }
    const Body body = moves ? body_of(*context, *queue, position, *flight) : Body{};
    const uint32_t left = body.bytes;
    const uint32_t given = copier.start(group, left != 0, position, body);
    if (given != 0) flight->body_placed += given;
    const uint32_t whole = mlx5::leading(group, goes && given == left);
    if (moves && given == left && group.lane() < whole) {
        flight->copied_at = copier.started(context, flight->request.bytes);
    }
    return whole;
}

/// Let messages that depart be judged by the responder, and their bodies be placed.
template <class Group, class Copier>
EPCOMM_HD inline bool start_window(Group group, Context* context, QueuePair* queue,
                                   Copier& copier) {
    const uint64_t first = queue->started, position = first + group.lane();
    const uint32_t width = context->width(group), lane = group.lane();
    Flight* flight = &queue->flight(position);
    Picoseconds depart = kNever;
    if (lane < width && position < queue->fetched && position - queue->landed < Copier::kWindow &&
        flight->syndrome == 0) {
        depart = flight->times.depart;
    }
    uint32_t count = mlx5::leading(group, depart <= context->now);
    if (count < group.size()) context->wake_at(group.at(depart, count));
    if (count == 0) return false;
    const PeerView peer =
        look_at_peer(*context, *queue, lane < count ? flight->request.remote_key : kFirstKey);
    if (!peer.answers) {
        const Picoseconds retries = context->own().line.retry_ns * kNanosecond;
        const bool over = context->is_due(group.from_first(depart) + retries);
        group.sync();
        if (over && lane == 0) give_up(*context, queue, flight);
        if (!over) context->wake_at(context->now + retries / 8);  // it is sent again
        group.sync();
        return false;
    }
    uint8_t syndrome = 0;
    if (lane < count) syndrome = judge_remote(peer, flight->request);
    const uint32_t refused = mlx5::lowest(group.ballot(syndrome != 0));
    if (lane == refused) {
        refuse(queue, flight, syndrome, syndrome == mlx5::kRemoteAccess ? kVendorRemoteAccess : 0);
    }
    if (refused < count) count = refused;
    // The others go on when what they wait for has landed.
    count = undisturbing(group, queue, first, count);
    const uint32_t started = start_bodies(group, context, queue, position, count, copier);
    group.sync();
    if (lane == 0) queue->started = first + started;
    context->progress = context->progress || started != 0 || refused < count;
    if (started < count) context->wake_at(context->now);  // the copier has no room
    group.sync();
    return started == width;
}

/// Give the copier the bodies of long writes that wait for their turn on the line. Their bytes stay
/// what they are from the doorbell on, and nobody may rely on their place before a later signal; so
/// the copier has more time than the message is on its way. It is judged as when it departs, and
/// then again: the responder's answer is that one. Behind what failed nothing is copied.
template <class Group, class Placer>
EPCOMM_COLD void copy_ahead(Group group, Context* context, QueuePair* queue, Placer placer) {
    const uint64_t position = queue->started + group.lane();
    Flight* flight = &queue->flight(position);
    bool wants = false;
    if (queue->refused == 0 && group.lane() < context->width(group) && position < queue->fetched &&
        position - queue->landed < Placer::kWindow) {
        const Request& request = flight->request;
        wants = request.opcode == mlx5::kRdmaWrite && request.bytes > Placer::kKeptBytes &&
                flight->num_pieces <= 1 && flight->body_placed == 0;
    }
    const uint32_t long_ones = group.ballot(wants);
    if (long_ones == 0) return;
    const uint32_t count = mlx5::highest(long_ones) + 1;
    const uint32_t free = undisturbing(group, queue, queue->started, count);
    wants = wants && group.lane() < free;
    const PeerView peer =
        look_at_peer(*context, *queue, wants ? flight->request.remote_key : kFirstKey);
    if (wants) wants = peer.answers && judge_remote(peer, flight->request) == 0;
    Body body{};
    if (wants) body = body_of(*context, *queue, position, *flight);
    body.is_ahead = true;
    const uint32_t given = placer.start(group, wants, position, body);
    if (given != 0) flight->body_placed = given;
    if (group.ballot(given != 0) != 0) context->progress = true;
    // It may be given once an earlier copy has ended.
    if (group.ballot(wants && given == 0) != 0) context->wake_at(context->now + kCopyAgain);
    group.sync();
}

/// Take the peer NIC's atomics; nobody else's operation is then between its read and its write.
/// Who died with them, or holds them for longer than anybody could, has lost them.
EPCOMM_HD inline bool take_atomics(const Context& context, QueuePair* queue) {
    uint64_t* word = &context.wire->nic(queue->peer_nic).atomics;
    const uint64_t now_ns = context.now / kNanosecond;
    const uint64_t seen = fabric::load_relaxed(word);
    if (seen != 0) {
        const uint32_t holder = uint32_t(seen & 0xffff) - 1;
        const bool dead = holder < context.wire->num_nics &&
                          fabric::load_relaxed(&context.wire->nic(holder).dead) != 0;
        const uint64_t held_ns = (now_ns - (seen >> 16)) & (~uint64_t(0) >> 16);
        if (!dead && held_ns < kLongestHoldNs) return false;
    }
    // Another value each time, so that who lost them knows.
    const uint64_t mine = now_ns << 16 | (context.nic + 1);
    if (!mlx5::exchange_if<mlx5::Scope::kSystem>(word, seen, mine)) return false;
    queue->lock = mine;
    return true;
}

EPCOMM_HD inline uint64_t* word_of(const Context& context, const QueuePair& queue,
                                   const Request& request) {
    return reinterpret_cast<uint64_t*>(
        context.wire->reach(queue.peer_nic, request.remote_key, request.remote_address));
}

/// First half of the atomics of the lanes that `go`, no two of them on one word. Whether it is
/// done.
template <class Group>
EPCOMM_COLD bool read_words(Group group, Context* context, QueuePair* queue, Flight* flight,
                            bool goes) {
    int taken = 0;
    if (group.lane() == 0) taken = take_atomics(*context, queue);
    taken = group.from_first(taken);
    if (taken == 0) {
        context->wake_at(context->now + kAtomicGap);
        return false;
    }
    group.sync();
    if (goes) {
        flight->old_value = fabric::load_acquire(word_of(*context, *queue, flight->request));
        flight->read_at = context->now;
    }
    context->progress = true;
    group.sync();
    return true;
}

/// Second half. False: the atomics were lost meanwhile, and it is to begin again.
template <class Group>
EPCOMM_COLD bool write_words(Group group, Context* context, QueuePair* queue, Flight* flight,
                             bool goes) {
    uint64_t* atomics = &context->wire->nic(queue->peer_nic).atomics;
    const bool held = group.from_first(fabric::load_acquire(atomics)) == queue->lock;
    if (goes && held) {
        const Request& request = flight->request;
        uint64_t value = flight->old_value + request.operand;
        if (request.opcode == mlx5::kAtomicCompareSwap) {
            value = flight->old_value == request.compare ? request.operand : flight->old_value;
        }
        // After all that landed before.
        fabric::store_release(word_of(*context, *queue, request), value);
        flight->copied_at = context->now;
    } else if (goes) {
        flight->read_at = kNever;
    }
    group.sync();
    if (group.lane() == 0) {
        if (held) fabric::store_release(atomics, uint64_t(0));
        queue->lock = 0;
    }
    context->progress = true;
    group.sync();
    return held;
}

/// What remains to be done for a request, once it is due.
enum class Landing : uint32_t { kTail, kLastPiece, kWord, kRead, kWrite };

/// Whether a request writes one aligned word. It changes at once, after all that landed before: a
/// reader that waits for a counter to be written must see neither half of it nor old bytes.
EPCOMM_HD inline bool is_word(const Flight& flight) {
    return copies(flight.request) && flight.request.opcode == mlx5::kRdmaWrite &&
           flight.request.bytes == 8 && flight.request.remote_address % 8 == 0 &&
           flight.num_pieces <= 1;
}

/// ... and when that is. A copy that has not ended is looked at again soon.
template <class Copier>
EPCOMM_HD inline Picoseconds landing_of(Context* context, uint64_t position, Flight* flight,
                                        Copier& copier, Landing* what) {
    *what = Landing::kTail;
    if (flight->request.is_atomic()) {
        const bool is_read = flight->read_at != kNever;
        *what = is_read ? Landing::kWrite : Landing::kRead;
        return is_read ? flight->read_at + kAtomicGap : flight->last_piece;
    }
    if (!copies(flight->request)) return flight->last_piece;
    if (is_word(*flight)) {
        *what = Landing::kWord;
        flight->copied_at = context->now;
        return flight->last_piece;
    }
    if (flight->num_pieces > 1 && flight->pieces_placed < flight->num_pieces) {
        *what = Landing::kLastPiece;
        return flight->last_piece;
    }
    if (flight->copied_at == 0) flight->copied_at = copier.placed(*context, position);
    if (flight->copied_at == 0) return context->now + 1;
    return flight->copied_at > flight->last_piece ? flight->copied_at : flight->last_piece;
}

/// The last bytes of the messages of the lanes that go.
template <class Group, class Copier>
EPCOMM_HD inline void place_tails(Group group, const Context& context, QueuePair& queue,
                                  uint64_t position, bool goes, Copier& copier) {
    const Flight& flight = queue.flight(position);
    const Request& request = flight.request;
    copier.settle(group, goes && (flight.body_placed != 0 || flight.num_pieces > 1));
    if (!goes || !copies(request) || flight.num_pieces > 1) return;
    const Placement place = placement_of(context, queue, position, request);
    const uint32_t tail = tail_of(request), body = request.bytes - tail;
    copier.place(place.to + body, place.from + body, tail);
}

/// The words of the lanes that go. What landed before was stored by lanes that this one has met.
template <class Group>
EPCOMM_HD inline void write_words_behind(Group group, const Context& context, QueuePair& queue,
                                         uint64_t position, bool goes) {
    if (group.ballot(goes) == 0) return;
    const Request& request = queue.flight(position).request;
    uint64_t word = 0;
    if (goes && request.inlined) word = request.operand;
    if (goes && !request.inlined) {
        const Placement place = placement_of(context, queue, position, request);
        memcpy(&word, place.from, sizeof word);
    }
    group.sync();
    mlx5::fence<mlx5::Scope::kSystem>();
    if (goes) fabric::store_relaxed(word_of(context, queue, request), word);
}

template <class Copier>
EPCOMM_HD inline void finish_landing(const Context& context, const QueuePair& queue,
                                     uint64_t position, Flight* flight, Copier& copier) {
    flight->landed = 1;
    // The later of model and copier, for the acknowledgement too.
    if (flight->copied_at > flight->times.arrive && flight->num_pieces <= 1) {
        const Picoseconds back = flight->times.complete - flight->times.arrive;
        flight->times.complete = flight->copied_at + back;
    }
    if (flight->request.opcode != mlx5::kNop) copier.landed(context, queue, position, *flight);
}

/// How a window of requests stands after a look at it.
struct Window {
    uint32_t landed;  ///< from the first on
    bool again;       ///< something else happened; the next step may be due
    bool failed;      ///< the first of the others has failed
};

/// Land what is due of the requests from `base` on: a run of the same kind, in order; only relaxed
/// requests pass others (`in_order` false).
template <class Group, class Copier>
EPCOMM_HD inline Window land_window(Group group, Context* context, QueuePair* queue, uint64_t base,
                                    bool in_order, Copier& copier) {
    const uint32_t lane = group.lane();
    const uint64_t position = base + lane;
    Flight* flight = &queue->flight(position);
    bool over = false, failed = false;
    Picoseconds due = kNever;
    Landing what = Landing::kTail;
    if (lane < context->width(group) && position < queue->fetched) {
        over = flight->landed != 0;
        failed = flight->syndrome != 0;
        if (!over && !failed && position < queue->started && (in_order || flight->relaxed)) {
            due = landing_of(context, position, flight, copier, &what);
        }
    }
    const bool ready = due <= context->now;
    const uint32_t reach = mlx5::leading(group, over || ready);
    if (reach < group.size()) context->wake_at(group.at(due, reach));
    const uint32_t fresh = group.ballot(ready && lane < reach), first = mlx5::lowest(fresh);
    if (first == 32) return {reach, false, group.from_first(int(failed)) != 0};
    // A write behind an atomic waits for it, and the other way round.
    const auto kind = Landing(group.at(uint32_t(what), first));
    const bool is_alike =
        ready && (what == kind || (kind == Landing::kTail && what == Landing::kWord));
    const uint32_t words = group.ballot(is_alike && what == Landing::kWord);
    uint32_t others = ~group.ballot(is_alike);
    // Words land behind all else.
    if (words != 0) others |= ~words & ~mlx5::below(mlx5::lowest(words));
    uint32_t end = mlx5::lowest(others & ~mlx5::below(first));
    if (end > reach) end = reach;
    if (kind == Landing::kRead || mlx5::count_bits(words) > 1) {
        // Nor are there two on one word.
        const bool changes = is_alike && what != Landing::kTail;
        const uint64_t word =
            changes ? uint64_t(word_of(*context, *queue, flight->request)) : uint64_t(lane);
        const uint32_t same = group.alike(word);
        const uint32_t twice = group.ballot(changes && (same & mlx5::below(lane)) != 0);
        if (mlx5::lowest(twice) < end) end = mlx5::lowest(twice);
    }
    const bool goes = lane >= first && lane < end;
    switch (kind) {
        case Landing::kRead: {
            const bool again = read_words(group, context, queue, flight, goes);
            return {first, again, false};
        }
        case Landing::kWrite:
            if (!write_words(group, context, queue, flight, goes)) return {first, true, false};
            break;
        case Landing::kLastPiece: {
            const bool again = start_piece(group, *context, queue, base, copier.placer());
            if (again && lane == 0) flight->copied_at = copier.started(context, 0);
            if (!again) context->wake_at(context->now);
            context->progress = context->progress || again;
            group.sync();
            return {0, again, false};
        }
        case Landing::kTail:
        case Landing::kWord:
            place_tails(group, *context, *queue, position, goes && what == Landing::kTail, copier);
            write_words_behind(group, *context, *queue, position, goes && what == Landing::kWord);
    }
    if (goes) finish_landing(*context, *queue, position, flight, copier);
    context->progress = true;
    group.sync();
    return {end, false, false};
}

/// Land in order; only relaxed requests pass others that have not landed, none passes a failed one.
template <class Group, class Copier>
EPCOMM_HD inline void land(Group group, Context* context, QueuePair* queue, Copier& copier) {
    if (context->progress) copier.refresh(group, context);
    while (queue->started != queue->fetched && start_window(group, context, queue, copier)) {
    }
    if constexpr (Copier::kCopiesAhead) {
        if (queue->started != queue->fetched) copy_ahead(group, context, queue, copier.placer());
    }
    if (context->progress) copier.refresh(group, context);
    uint64_t base = queue->landed;
    bool in_order = true;
    while (base < queue->fetched) {
        const Window window = land_window(group, context, queue, base, in_order, copier);
        base += window.landed;
        if (window.landed != 0 && in_order) {
            group.sync();
            if (group.lane() == 0) queue->landed = base;
            group.sync();
        }
        if (window.landed != 0 || window.again) {
            copier.refresh(group, context);
            continue;
        }
        if (window.failed || queue->passes == 0) return;
        in_order = false;
        base += 1;
    }
}

}  // namespace epcomm::emulated
