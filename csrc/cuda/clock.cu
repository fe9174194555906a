// Compares the GPU's timer with the host's clock, for timelines of several GPUs.
#include <cuda_runtime.h>
#include <time.h>

#include "../kernels/memory.cuh"
#include "epcomm_cuda.h"

namespace epcomm {

namespace {

constexpr int kRounds = 16;  ///< the shortest counts

__global__ void read_clock_kernel(volatile uint64_t* into) { *into = now_ns(); }

int64_t host_now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return int64_t(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

/// One comparison: the kernel ran between two looks at the host's clock.
cudaError_t compare_once(volatile uint64_t* place, cudaStream_t stream, int64_t* device,
                         int64_t* host, int64_t* error) {
    const int64_t before = host_now_ns();
    read_clock_kernel<<<1, 1, 0, stream>>>(place);
    cudaError_t status = cudaGetLastError();
    if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
    const int64_t after = host_now_ns();
    *device = int64_t(*place);
    *host = before + (after - before) / 2;
    *error = (after - before + 1) / 2;
    return status;
}

}  // namespace

int load_clock() {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, read_clock_kernel);
}

}  // namespace epcomm

extern "C" int epcomm_cuda_compare_clocks(int64_t* device_ns, int64_t* host_ns, int64_t* error_ns) {
    uint64_t* place = nullptr;
    cudaStream_t stream = nullptr;
    cudaError_t status = cudaHostAlloc(&place, sizeof *place, cudaHostAllocMapped);
    if (status == cudaSuccess) {
        status = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    }
    *error_ns = INT64_MAX;
    for (int i = 0; status == cudaSuccess && i < epcomm::kRounds; ++i) {
        int64_t device = 0, host = 0, error = 0;
        status = epcomm::compare_once(place, stream, &device, &host, &error);
        if (error >= *error_ns) continue;
        *device_ns = device;
        *host_ns = host;
        *error_ns = error;
    }
    if (stream != nullptr) cudaStreamDestroy(stream);
    cudaFreeHost(place);
    return status;
}
