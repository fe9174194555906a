// What a producer does in a self-test of a direct transport, the same on host and device.
#pragma once

#include "ibgda.h"

namespace epcomm::fabric {

/// The shortest nanoseconds of one kind of request.
struct ProbeTimes {
    uint64_t call = ~uint64_t(0);        ///< written, published, and the doorbell rung
    uint64_t completion = ~uint64_t(0);  ///< from then on until its completion was read

    EPCOMM_HD void keep(int64_t start, int64_t rung, int64_t end) {
        if (uint64_t(rung - start) < call) call = uint64_t(rung - start);
        if (uint64_t(end - rung) < completion) completion = uint64_t(end - rung);
    }
};

/// False: the call or its request failed.
template <class Call>
EPCOMM_HD inline bool time_of(const epcomm_ibgda_probe& probe, const Call& call,
                              ProbeTimes* times) {
    const int64_t start = now_ns();
    if (call() == 0) return false;
    const int64_t rung = now_ns();
    if (!flush(probe.ibgda, probe.channel, probe.timeout_ns)) return false;
    times->keep(start, rung, now_ns());
    return true;
}

/// Add, and wait until the old value lies in the round's word.
EPCOMM_HD inline bool add_in_round(const epcomm_ibgda_probe& probe, int32_t round,
                                   ProbeTimes* times) {
    const Lane lane{probe.peer, probe.channel};
    epcomm_fabric_place place = probe.answers;
    place.offset += uint64_t(round) * sizeof(uint64_t);
    const RegionKey* keys = keys_on(probe.ibgda, probe.ibgda.local, 0, plane_of(probe.ibgda, lane));
    auto* word = reinterpret_cast<uint64_t*>(keys[place.region].address + place.offset);
    store_release(word, kNoAnswer);
    const auto add = [&] { return fetch_add_at(probe.ibgda, lane, probe.counter, place, 1); };
    if (!time_of(probe, add, times)) return false;
    FabricWait wait(probe.ibgda, probe.timeout_ns);
    uint64_t answer;
    return await_answer(word, wait, &answer);
}

EPCOMM_HD inline void run_probe(const epcomm_ibgda_probe& probe) {
    const Lane lane{probe.peer, probe.channel};
    ProbeTimes put, lone, addition;
    const auto put_and_signal = [&] {
        return put_signal(probe.ibgda, lane, probe.remote, probe.local, probe.bytes, probe.signal);
    };
    const auto signal = [&] { return signal_add(probe.ibgda, lane, probe.other_signal, 1); };
    uint64_t failures = 0;
    for (int32_t i = 0; i < probe.rounds; ++i) {
        const bool ok = time_of(probe, put_and_signal, &put) && time_of(probe, signal, &lone) &&
                        (probe.adds == 0 || add_in_round(probe, i, &addition));
        failures += ok ? 0 : 1;
    }
    probe.result[0] = failures;
    uint64_t* result = probe.result + 1;
    const ProbeTimes all[] = {put, lone, addition};
    for (const ProbeTimes& times : all) {
        *result++ = times.call;
        *result++ = times.completion;
    }
}

}  // namespace epcomm::fabric
