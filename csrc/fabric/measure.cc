// Measuring producers on the host; the kernels' side is in probe.cu.

#include "measure.h"

using namespace epcomm::fabric;

extern "C" {

int64_t epcomm_fabric_measure_triggers(const epcomm_fabric* fabric, int32_t peer, int32_t channel,
                                       int32_t count, int32_t round_trip, int64_t timeout_ns) {
    return measure_triggers(*fabric, {peer, channel}, count, round_trip != 0, timeout_ns);
}

int64_t epcomm_fabric_measure_ping(const epcomm_fabric* fabric, int32_t peer, int32_t signal,
                                   const uint64_t* counter, uint64_t base, int32_t rounds,
                                   int32_t leads, int64_t timeout_ns) {
    return measure_ping(*fabric, {peer, 0}, signal, counter, base, rounds, leads != 0, timeout_ns);
}

}  // extern "C"
