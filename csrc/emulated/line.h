// The line model: when a message leaves, arrives and is acknowledged.
//
//     depart    the sender's port is free, the request has been fetched
//     arrive    the last byte is in the receiver's port, which other senders share (incast)
//     complete  the acknowledgement, or the response, is back
//
// Both ports are full duplex; a direction of a port serves messages in the order in which they are
// scheduled. A message occupies the sender's port and, one latency later, the receiver's for
// (payload + headers) / rate; the sender's at least for what an NIC needs between two messages.
// Acknowledgements take no room. Responses of reads occupy the ports the other way; those of
// atomics are counted as nothing.
//
// A group schedules a message of each of its lanes at once, in the order of lanes, with one
// exchange for each gate: the times are those of one message after the other.
#pragma once

#include "../fabric/atomics.h"
#include "../mlx5/group.h"
#include "wire.h"

namespace epcomm::emulated {

struct Schedule {
    Picoseconds depart;
    Picoseconds arrive;
    Picoseconds complete;
};

EPCOMM_HD inline uint32_t wire_bytes(const LineModel& line, uint32_t payload) {
    uint32_t packets = 1;
    if (payload > line.packet_bytes) packets = (payload - 1) / line.packet_bytes + 1;
    return payload + packets * line.header_bytes;
}

/// In 32-bit divisions, which a device does much faster than longer ones.
EPCOMM_HD inline Picoseconds duration(const LineModel& line, uint32_t payload) {
    if (line.bytes_per_ns == 0) return 0;
    const uint32_t bytes = wire_bytes(line, payload);
    const uint32_t rest = bytes % line.bytes_per_ns * uint32_t(kNanosecond);
    return bytes / line.bytes_per_ns * kNanosecond + rest / line.bytes_per_ns;
}

/// Take a gate that is next free at `seen`, or later, for `length` from `earliest` at the soonest;
/// returns when it was free. Other NICs, of other threads or processes, take the same receive gate.
EPCOMM_HD inline Picoseconds exchange_gate(Gate* gate, Picoseconds seen, Picoseconds earliest,
                                           Picoseconds length) {
    while (true) {
        const Picoseconds next = (seen > earliest ? seen : earliest) + length;
#ifdef __CUDA_ARCH__
        const Picoseconds old =
            atomicCAS_system(reinterpret_cast<unsigned long long*>(&gate->free_at), seen, next);
        if (old == seen) return seen;
        seen = old;
#else
        if (__atomic_compare_exchange_n(&gate->free_at, &seen, next, true, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED)) {
            return seen;
        }
#endif
    }
}

/// What the lanes that take part need of a gate.
struct Passes {
    Picoseconds before;  ///< that the gate is taken by the lanes below
    Picoseconds all;     ///< by all lanes; 0: a gate without limit, which keeps nobody waiting
    int64_t ready;       ///< if the gate were free always, this one would start `before` after it
    int64_t last;        ///< `ready` of the last lane

    EPCOMM_HD Picoseconds start(Picoseconds free) const {
        return before + (free > Picoseconds(ready) ? free : Picoseconds(ready));
    }
};

/// A `length` of every lane that `takes` part, each from its own `earliest` at the soonest.
template <class Group>
EPCOMM_HD inline Passes ask_for(Group group, bool takes, Picoseconds earliest, Picoseconds length) {
    if (!takes) length = 0;
    const uint32_t taking = group.ballot(takes);
    if (taking == 0) return {0, 0, int64_t(earliest), 0};
    const uint32_t last = mlx5::highest(taking), count = last + 1;
    const Picoseconds before = mlx5::sum_before(group, count, length);
    const Picoseconds all = group.at(before + length, last);
    if (all == 0) return {0, 0, int64_t(earliest), 0};
    // Mostly all of them may start at once, and then `ready` is the same for all.
    auto ready = int64_t(group.at(earliest, mlx5::lowest(taking)));
    if (group.ballot(takes && int64_t(earliest - before) > ready) != 0) {
        ready = mlx5::largest_until(group, count, takes ? int64_t(earliest - before) : int64_t(0));
    }
    return {before, all, ready, group.at(ready, last)};
}

/// Take a gate that was free at `seen` a moment ago; returns when it is. By one lane.
EPCOMM_HD inline Picoseconds take_gate(Gate* gate, Picoseconds seen, const Passes& passes) {
    return passes.all == 0 ? 0 : exchange_gate(gate, seen, Picoseconds(passes.last), passes.all);
}

/// The two ends of a transfer, and when their gates were free a moment ago: far away, so all of it
/// is loaded at once.
struct Ends {
    Nic* from;
    Nic* to;
    LineModel line;     ///< of `from`
    LineModel to_line;  ///< of `to`
    Picoseconds transmit, receive;
};

EPCOMM_HD inline Ends look_at_ends(Nic* from, Nic* to) {
    return {from,
            to,
            from->line,
            to->line,
            fabric::load_relaxed(&from->transmit.free_at),
            fabric::load_relaxed(&to->receive.free_at)};
}

EPCOMM_HD inline bool is_same_rate(const Ends& ends) {
    return ends.line.bytes_per_ns == ends.to_line.bytes_per_ns &&
           ends.line.packet_bytes == ends.to_line.packet_bytes &&
           ends.line.header_bytes == ends.to_line.header_bytes;
}

/// When the sender's port and the receiver's are free. Exchanges with memory are waited for, so two
/// lanes make one each.
template <class Group>
EPCOMM_HD inline void take_ports(Group group, const Ends& ends, const Passes& out, const Passes& in,
                                 Picoseconds* transmit, Picoseconds* receive) {
    Gate *const from = &ends.from->transmit, *const to = &ends.to->receive;
    if (group.size() == 1) {
        *transmit = take_gate(from, ends.transmit, out);
        *receive = take_gate(to, ends.receive, in);
        return;
    }
    const bool sends = group.lane() == 0;
    const Picoseconds all = sends ? out.all : in.all;
    const auto last = Picoseconds(sends ? out.last : in.last);
    Picoseconds free = 0;
    if (group.lane() < 2 && all != 0) {
        free = exchange_gate(sends ? from : to, sends ? ends.transmit : ends.receive, last, all);
    }
    *transmit = group.at(free, 0);
    *receive = group.at(free, 1);
}

/// A message of `payload` bytes of each lane that `takes` part, from one port to another; returns
/// when its last byte arrives.
///
/// The receiver's port is taken from the moment on at which a byte that is scheduled `now` could be
/// there, not from the moment at which this message's first one will: two warps that schedule for
/// one port, or two senders that are far ahead of time, need not take the receiver's port in the
/// order in which their bytes come, and whoever came too early would keep it idle meanwhile. So the
/// port never receives more than its rate allows since the messages were scheduled.
template <class Group>
EPCOMM_HD inline Picoseconds transfer(Group group, const Ends& ends, bool takes, Picoseconds now,
                                      Picoseconds earliest, uint32_t payload, Picoseconds* depart) {
    const Picoseconds out = duration(ends.line, payload);
    const Picoseconds in = is_same_rate(ends) ? out : duration(ends.to_line, payload);
    const Picoseconds latency = ends.line.latency_ns * kNanosecond;
    const Picoseconds least = ends.line.message_ns * kNanosecond;
    const Passes sends = ask_for(group, takes, earliest, out > least ? out : least);
    const Passes receives = ask_for(group, takes, now + latency, in);
    Picoseconds transmit, receive;
    take_ports(group, ends, sends, receives, &transmit, &receive);
    *depart = sends.start(transmit);
    // The slower of two ports decides.
    const Picoseconds sent = *depart + latency + out, received = receives.start(receive) + in;
    return received > sent ? received : sent;
}

/// When the bytes that a read asks for, from `to` at `earliest`, are at `from`.
template <class Group>
EPCOMM_COLD Picoseconds answer(Group group, Nic* from, Nic* to, bool is_read, Picoseconds now,
                               Picoseconds earliest, uint32_t payload) {
    Picoseconds depart;
    return transfer(group, look_at_ends(to, from), is_read, now, earliest, payload, &depart);
}

/// Schedule a request of `payload` bytes of each lane that `takes` part and may start at
/// `earliest`. Where there is a read, no other lane takes part.
template <class Group>
EPCOMM_HD inline Schedule schedule(Group group, const Ends& ends, bool takes, Picoseconds now,
                                   Picoseconds earliest, uint32_t payload, bool is_read) {
    Schedule times;
    const Picoseconds back = ends.to_line.latency_ns * kNanosecond;
    times.arrive =
        transfer(group, ends, takes, now, earliest, is_read ? 0 : payload, &times.depart);
    times.complete = times.arrive + back;
    if (group.ballot(is_read) != 0) {
        const Picoseconds complete =
            answer(group, ends.from, ends.to, is_read, now, times.arrive, payload);
        if (is_read) times.complete = complete;
    }
    return times;
}

}  // namespace epcomm::emulated
