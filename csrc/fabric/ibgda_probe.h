// What a producer does in a self-test of a direct transport, the same on host and device.
#pragma once

#include "ibgda.h"

namespace epcomm::fabric {

/// Nanoseconds from a call to the completion of its request; -1: it failed.
template <class Call>
EPCOMM_HD inline int64_t time_of(const epcomm_ibgda_probe& probe, const Call& call) {
    const int64_t start = now_ns();
    const bool ok = call() != 0 && flush(probe.ibgda, probe.channel, probe.timeout_ns);
    return ok ? now_ns() - start : -1;
}

EPCOMM_HD inline void run_probe(const epcomm_ibgda_probe& probe) {
    const Lane lane{probe.peer, probe.channel};
    uint64_t failures = 0, put = ~uint64_t(0), signal = ~uint64_t(0);
    const auto keep = [](uint64_t* shortest, int64_t ns) {
        if (ns >= 0 && uint64_t(ns) < *shortest) *shortest = uint64_t(ns);
        return ns >= 0;
    };
    for (int32_t i = 0; i < probe.rounds; ++i) {
        const bool ok =
            keep(&put, time_of(probe,
                               [&] {
                                   return put_signal(probe.ibgda, lane, probe.remote, probe.local,
                                                     probe.bytes, probe.signal);
                               })) &&
            keep(&signal, time_of(probe, [&] {
                return signal_add(probe.ibgda, lane, probe.other_signal, 1);
            }));
        failures += ok ? 0 : 1;
    }
    probe.result[0] = failures;
    probe.result[1] = put;
    probe.result[2] = signal;
}

}  // namespace epcomm::fabric
