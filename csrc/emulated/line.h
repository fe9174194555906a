// The line model: when a message leaves, arrives and is acknowledged.
//
//     depart    the sender's port and message gate are free, the request has been fetched
//     arrive    the last byte is in the receiver's port, which other senders share (incast)
//     complete  the acknowledgement, or the response, is back
//
// Both ports are full duplex; a direction of a port serves messages in the order in which they are
// scheduled. A message occupies the sender's port and, one latency later, the receiver's for
// (payload + headers) / rate. Acknowledgements take no room. Responses of reads occupy the ports
// the other way; those of atomics are counted as nothing.
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
    const uint32_t packets = payload == 0 ? 1 : (payload - 1) / line.packet_bytes + 1;
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

/// Take the gate for a `length` of every lane that `takes` part, each from its own `earliest` at
/// the soonest; returns the start. `seen` is when the gate was free a moment ago.
template <class Group>
EPCOMM_HD inline Picoseconds occupy(Group group, Gate* gate, Picoseconds seen, bool takes,
                                    Picoseconds earliest, Picoseconds length) {
    if (!takes) length = 0;
    const Picoseconds before = mlx5::sum_before(group, length);
    const Picoseconds all = group.at(before + length, group.size() - 1);
    if (all == 0) return earliest;  // a gate without limit keeps nobody waiting
    // If the gate were free always, a lane would start `before` after this. Mostly all of them may
    // start at once, and then it is the same for all.
    const uint32_t taking = group.ballot(takes);
    auto ready = int64_t(group.at(earliest, mlx5::lowest(taking)));
    if (group.ballot(takes && int64_t(earliest - before) > ready) != 0) {
        ready = mlx5::largest_until(group, takes ? int64_t(earliest - before) : int64_t(0));
    }
    const int64_t last = group.at(ready, group.size() - 1);
    Picoseconds free = 0;
    if (group.lane() == 0) free = exchange_gate(gate, seen, Picoseconds(last), all);
    free = group.from_first(free);
    return before + (free > Picoseconds(ready) ? free : Picoseconds(ready));
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
EPCOMM_HD inline Picoseconds transfer(Group group, Nic* from, Nic* to, bool takes, Picoseconds now,
                                      Picoseconds earliest, uint32_t payload, Picoseconds* depart) {
    // All that is far away, first.
    const Picoseconds messages = fabric::load_relaxed(&from->messages.free_at);
    const Picoseconds transmit = fabric::load_relaxed(&from->transmit.free_at);
    const Picoseconds receive = fabric::load_relaxed(&to->receive.free_at);
    const Picoseconds out = duration(from->line, payload), in = duration(to->line, payload);
    const Picoseconds latency = from->line.latency_ns * kNanosecond;
    const Picoseconds start = occupy(group, &from->messages, messages, takes, earliest,
                                     from->line.message_ns * kNanosecond);
    *depart = occupy(group, &from->transmit, transmit, takes, start, out);
    const Picoseconds first_byte = *depart + latency;
    const Picoseconds received =
        occupy(group, &to->receive, receive, takes, now + latency, in) + in;
    // The slower of two ports decides.
    const Picoseconds sent = first_byte + out;
    return received > sent ? received : sent;
}

/// Schedule a request of `payload` bytes of each lane that `takes` part and may start at
/// `earliest`. Where there is a read, no other lane takes part.
template <class Group>
EPCOMM_HD inline Schedule schedule(Group group, Nic* from, Nic* to, bool takes, Picoseconds now,
                                   Picoseconds earliest, uint32_t payload, bool is_read) {
    Schedule times;
    const Picoseconds back = to->line.latency_ns * kNanosecond;
    times.arrive =
        transfer(group, from, to, takes, now, earliest, is_read ? 0 : payload, &times.depart);
    times.complete = times.arrive + back;
    if (group.ballot(is_read) != 0) {
        Picoseconds depart;
        const Picoseconds complete =
            transfer(group, to, from, is_read, now, times.arrive, payload, &depart);
        if (is_read) times.complete = complete;
    }
    return times;
}

}  // namespace epcomm::emulated
