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
#pragma once

#include "wire.h"

namespace epcomm::emulated {

struct Schedule {
    Picoseconds depart;
    Picoseconds arrive;
    Picoseconds complete;
};

EPCOMM_HD inline uint64_t wire_bytes(const LineModel& line, uint64_t payload) {
    const uint64_t packets =
        payload == 0 ? 1 : (payload + line.packet_bytes - 1) / line.packet_bytes;
    return payload + packets * line.header_bytes;
}

EPCOMM_HD inline Picoseconds duration(const LineModel& line, uint64_t payload) {
    if (line.bytes_per_ns == 0) return 0;
    return wire_bytes(line, payload) * kNanosecond / line.bytes_per_ns;
}

/// Take the gate for `length` from `earliest` at the soonest; returns the start. Other NICs, of
/// other threads or processes, take the same receive gate.
EPCOMM_HD inline Picoseconds occupy(Gate* gate, Picoseconds earliest, Picoseconds length) {
#ifdef __CUDA_ARCH__
    auto* word = reinterpret_cast<unsigned long long*>(&gate->free_at);
    unsigned long long seen = *reinterpret_cast<volatile unsigned long long*>(word);
    while (true) {
        const Picoseconds start = seen > earliest ? Picoseconds(seen) : earliest;
        const unsigned long long old = atomicCAS_system(word, seen, start + length);
        if (old == seen) return start;
        seen = old;
    }
#else
    Picoseconds seen = __atomic_load_n(&gate->free_at, __ATOMIC_RELAXED);
    while (true) {
        const Picoseconds start = seen > earliest ? seen : earliest;
        if (__atomic_compare_exchange_n(&gate->free_at, &seen, start + length, true,
                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
            return start;
        }
    }
#endif
}

/// One message of `payload` bytes from one port to another; returns when its last byte arrives.
EPCOMM_HD inline Picoseconds transfer(Nic* from, Nic* to, Picoseconds earliest, uint64_t payload,
                                      Picoseconds* depart) {
    const Picoseconds out = duration(from->line, payload), in = duration(to->line, payload);
    const Picoseconds gate = occupy(&from->messages, earliest, from->line.message_ns * kNanosecond);
    *depart = occupy(&from->transmit, gate, out);
    const Picoseconds first_byte = *depart + from->line.latency_ns * kNanosecond;
    const Picoseconds received = occupy(&to->receive, first_byte, in) + in;
    // The slower of two ports decides.
    const Picoseconds sent = first_byte + out;
    return received > sent ? received : sent;
}

/// Schedule a request of `payload` bytes that may start at `earliest`.
EPCOMM_HD inline Schedule schedule(Nic* from, Nic* to, Picoseconds earliest, uint64_t payload,
                                   bool is_read) {
    Schedule times;
    const Picoseconds back = to->line.latency_ns * kNanosecond;
    times.arrive = transfer(from, to, earliest, is_read ? 0 : payload, &times.depart);
    times.complete = times.arrive + back;
    if (is_read) {
        Picoseconds depart;
        times.complete = transfer(to, from, times.arrive, payload, &depart);
    }
    return times;
}

}  // namespace epcomm::emulated
