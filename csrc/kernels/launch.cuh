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

/// Blocks of a launch, their threads and dynamic shared memory.
struct Grid {
    int blocks;
    int threads;
    int64_t shared_bytes;
};

/// Whether blocks of a kernel can come to their SMs before what is ahead on its stream has ended.
inline bool comes_early() {
    int device = 0, major = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return false;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    return major >= 9;
}

/// Launch a kernel that begins with begin_call(). Its blocks come to their SMs as soon as those of
/// the kernel ahead have left, or its last one has said that it waits for nobody any more
/// (call_next()); that this one's stores are seen they wait for in begin_call(). No kernel lets the
/// next one come sooner: the SMs it took might be those that a peer's kernel needs, for which the
/// present one waits.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
           const Arguments&... arguments) {
    static const bool early = comes_early();
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(grid.blocks));
    config.blockDim = dim3(unsigned(grid.threads));
    config.dynamicSmemBytes = size_t(grid.shared_bytes);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace epcomm
