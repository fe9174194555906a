// The self-test's producer as a kernel of one thread.

#include "ibgda_probe.h"

namespace {

__global__ void run(const __grid_constant__ epcomm_ibgda_probe probe) {
    epcomm::fabric::run_probe(probe);
}

}  // namespace

extern "C" int epcomm_fabric_probe_ibgda(const epcomm_ibgda_probe* probe, void* stream) {
    run<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(*probe);
    return cudaGetLastError();
}
