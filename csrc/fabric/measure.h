// What a producer does to be measured, the same on host and device.
#pragma once

#include "fabric.h"

namespace epcomm::fabric {

/// Put `count` empty triggers and wait for the last, or, with `round_trip`, for each in turn.
/// Returns nanoseconds, or -1 on failure.
EPCOMM_HD inline int64_t measure_triggers(const epcomm_fabric& fabric, Lane lane, int32_t count,
                                          bool round_trip, int64_t timeout_ns) {
    const Command noop{EPCOMM_FABRIC_NOOP, lane.peer, lane.channel, 0, {}, {}, 0, 0};
    const int64_t start = now_ns();
    Ticket ticket = 0;
    for (int32_t i = 0; i < count; ++i) {
        ticket = push(fabric, noop);
        const bool wait = round_trip || i == count - 1;
        while (ticket != 0 && wait && !done(fabric, lane.channel, ticket)) {
            if (failed(fabric) || now_ns() - start > timeout_ns) return -1;
#ifndef __CUDA_ARCH__
            relax();
#endif
        }
        if (ticket == 0) return -1;
    }
    return now_ns() - start;
}

/// A signal back and forth, `rounds` times: the leader raises the peer's `signal` and waits for its
/// own counter, the other the reverse. `counter` stands at `base` before. Returns nanoseconds for
/// all rounds, or -1.
EPCOMM_HD inline int64_t measure_ping(const epcomm_fabric& fabric, Lane lane, int32_t signal,
                                      const uint64_t* counter, uint64_t base, int32_t rounds,
                                      bool leads, int64_t timeout_ns) {
    const int64_t start = now_ns();
    for (int32_t i = 0; i < rounds; ++i) {
        if (leads && signal_add(fabric, lane, signal, 1) == 0) return -1;
        while (load_acquire(counter) < base + uint64_t(i) + 1) {
            if (failed(fabric) || now_ns() - start > timeout_ns) return -1;
#ifndef __CUDA_ARCH__
            relax();
#endif
        }
        if (!leads && signal_add(fabric, lane, signal, 1) == 0) return -1;
    }
    return now_ns() - start;
}

}  // namespace epcomm::fabric
