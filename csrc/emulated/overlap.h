// Which requests wait until those before them have landed.
//
// Copiers place bodies of several messages at once, in any order, and last bytes later. Between
// requests of one queue pair that use the same memory the order still holds: of two writes the
// later one's bytes stay, and a read brings what was written before it. So a body that would
// disturb an earlier request is not begun before that one has landed. Requests without a body land
// in their order anyway.
#pragma once

#include "fetch.h"

namespace epcomm::emulated {

/// The last bytes of a message, which come with its arrival and never before; all of a short one.
constexpr uint32_t kTailBytes = 64;

EPCOMM_HD inline bool copies(const Request& request) {
    return request.opcode != mlx5::kNop && !request.is_atomic();
}

EPCOMM_HD inline bool has_body(const Request& request) {
    return copies(request) && request.bytes > kTailBytes;
}

/// A range of addresses.
struct Span {
    uint64_t begin, bytes;

    EPCOMM_HD bool meets(Span other) const {
        return begin < other.begin + other.bytes && other.begin < begin + bytes;
    }
};

/// What a request changes at the peer, and here.
EPCOMM_HD inline Span written_there(const Request& request) {
    const bool writes = request.opcode == mlx5::kRdmaWrite || request.is_atomic();
    return {request.remote_address, writes ? request.bytes : 0};
}
EPCOMM_HD inline Span written_here(const Request& request) {
    return {request.local_address, request.has_response() ? request.bytes : 0};
}

/// Whether the body of `later` must wait for `earlier`.
EPCOMM_HD inline bool disturbs(const Request& later, const Request& earlier) {
    return has_body(later) && (written_there(earlier).meets({later.remote_address, later.bytes}) ||
                               written_here(earlier).meets(written_here(later)));
}

/// Look at every pair: of the `count` requests from `first` on, how many need not wait.
template <class Group>
EPCOMM_COLD uint32_t undisturbing_pairs(Group group, QueuePair* queue, uint64_t first,
                                        uint32_t count) {
    const uint64_t position = first + group.lane();
    const bool asks = group.lane() < count;
    bool waits = !asks;
    for (uint64_t other = queue->landed; other != first + count; ++other) {
        const Flight& earlier = queue->flight(other);  // all lanes read the same
        if (asks && other < position && earlier.landed == 0) {
            waits = waits || disturbs(queue->flight(position).request, earlier.request);
        }
    }
    return mlx5::leading(group, !waits);
}

/// Whether it is plain to see that nobody waits: writes only, whose bodies go to rising places, and
/// nothing else but to one line of memory that no body meets, where signals are.
template <class Group>
EPCOMM_HD inline bool is_plain(Group group, QueuePair* queue, uint64_t end) {
    const uint64_t position = queue->landed + group.lane();
    const Request& request = queue->flight(position).request;
    constexpr uint64_t kLine = 64;
    const bool counts = position < end && request.opcode != mlx5::kNop;
    const bool is_body = counts && has_body(request);
    const uint32_t bodies = group.ballot(is_body);
    const uint32_t others = group.ballot(counts && !is_body);
    const uint64_t begin = request.remote_address, past = begin + request.bytes;
    const uint32_t before = bodies & mlx5::below(group.lane());
    const uint64_t last = group.at(past, before == 0 ? 0 : mlx5::highest(before));
    const uint64_t line = group.at(begin / kLine, others == 0 ? 0 : mlx5::lowest(others));
    const Span signals = {line * kLine, others == 0 ? 0 : kLine};
    bool is_odd = counts && request.opcode != mlx5::kRdmaWrite;
    if (is_body) {
        is_odd = is_odd || (before != 0 && begin < last) || signals.meets({begin, request.bytes});
    } else if (counts) {
        is_odd = is_odd || begin / kLine != line || (past - 1) / kLine != line;
    }
    return group.ballot(is_odd) == 0;
}

/// Of the `count` requests from `first` on, all before which have been started: how many may be,
/// before any lands that has not.
template <class Group>
EPCOMM_HD inline uint32_t undisturbing(Group group, QueuePair* queue, uint64_t first,
                                       uint32_t count) {
    const uint64_t end = first + count;
    if (end - queue->landed <= 1) return count;
    if (group.size() > 1 && end - queue->landed <= group.size() && is_plain(group, queue, end)) {
        return count;
    }
    return undisturbing_pairs(group, queue, first, count);
}

}  // namespace epcomm::emulated
