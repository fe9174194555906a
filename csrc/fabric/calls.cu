// A kernel of one thread that makes the calls it is given, one after another: what the list of
// tests that every transport passes needs of a producer on the GPU.

#include "ibgda.h"

namespace {

using namespace epcomm;
using fabric::Lane;

__device__ uint64_t make(const epcomm_ibgda_calls& all, const epcomm_fabric_call& call) {
    const Lane lane{call.peer, call.channel};
    switch (call.what) {
        case EPCOMM_FABRIC_PUT:
            return fabric::put(all.ibgda, lane, call.remote, call.local, call.bytes);
        case EPCOMM_FABRIC_PUT_SIGNAL:
            return fabric::put_signal(all.ibgda, lane, call.remote, call.local, call.bytes,
                                      call.signal);
        case EPCOMM_FABRIC_SIGNAL_ADD:
            return fabric::signal_add(all.ibgda, lane, call.signal, call.value);
        case EPCOMM_FABRIC_CALL_DONE: return fabric::done(all.ibgda, call.channel, call.value);
        case EPCOMM_FABRIC_CALL_FLUSH:
            return fabric::flush(all.ibgda, call.channel, all.timeout_ns);
        default: fabric::look(all.ibgda, lane); return 1;
    }
}

__global__ void run(const __grid_constant__ epcomm_ibgda_calls all) {
    for (int64_t i = 0; i < all.count; ++i) all.results[i] = make(all, all.calls[i]);
}

}  // namespace

extern "C" int epcomm_fabric_probe_calls(const epcomm_ibgda_calls* calls, void* stream) {
    run<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(*calls);
    return cudaGetLastError();
}
