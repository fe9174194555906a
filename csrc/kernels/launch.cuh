// Host side of a launch.
#pragma once

#include <cuda_runtime.h>

#include "epcomm_cuda.h"

namespace epcomm {

/// Dynamic shared memory a block may have: 227 KiB on sm_90, less the kernels' own variables.
constexpr int64_t kSharedLimit = 226 * 1024;
constexpr int64_t kSharedLimitAmpere = 162 * 1024;

/// What a block may have on the current device.
inline int64_t shared_limit() {
    int device = 0, bytes = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return kSharedLimitAmpere;
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return bytes - 1024 < kSharedLimit ? bytes - 1024 : kSharedLimit;
}

/// Load a kernel and let it have all the shared memory there is.
template <typename Kernel>
int load(Kernel kernel) {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
    // shared_limit() leaves 1 KiB for the kernels' own variables.
    const int64_t own = int64_t(attributes.sharedSizeBytes);
    const int64_t dynamic = shared_limit() - (own > 1024 ? own - 1024 : 0);
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(dynamic));
}

template <typename Kernel, typename Call>
int launch(Kernel kernel, const Call& call, int blocks, int threads, int64_t bytes,
           cudaStream_t stream) {
    kernel<<<blocks, threads, size_t(bytes), stream>>>(call);
    return cudaGetLastError();
}

}  // namespace epcomm
