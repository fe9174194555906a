// The C ABI of the CUDA back end.
#include <cuda_runtime.h>
#include <sched.h>
#include <time.h>

#include "../kernels/announce.cuh"
#include "epcomm_cuda_rail.h"

namespace epcomm {
int launch_dispatch(const epcomm_cuda_dispatch& call, cudaStream_t stream);
int launch_combine(const epcomm_cuda_combine& call, cudaStream_t stream);
int launch_calibrate(const epcomm_cuda_calibrate& call, cudaStream_t stream);
int load_dispatch();
int load_combine();
int launch_two_hop_layout(const epcomm_cuda_two_hop_layout& all, cudaStream_t stream);
int launch_two_hop_dispatch(const epcomm_cuda_two_hop_dispatch& all, cudaStream_t stream);
int launch_two_hop_combine(const epcomm_cuda_two_hop_combine& all, cudaStream_t stream);
int load_two_hop_layout();
int load_two_hop_dispatch();
int load_two_hop_combine();
int leave(epcomm_cuda_sequence* sequence, void* stream);
int load_calibrate();
int load_clock();

namespace {

/// The error that has made this process's context unusable, or 0.
int gpu_error() {
    const cudaError_t error = cudaStreamQuery(cudaStreamLegacy);
    // Another thread may be capturing a graph, which says nothing about the GPU.
    const bool captures =
        error >= cudaErrorStreamCaptureUnsupported && error <= cudaErrorStreamCaptureWrongThread;
    if (error == cudaSuccess) return cudaSuccess;
    if (error != cudaErrorNotReady && !captures) return error;
    cudaGetLastError();  // not the next launch's error
    return cudaSuccess;
}

}  // namespace
}  // namespace epcomm

extern "C" {

void epcomm_cuda_window_parts(const epcomm_cuda_row* row, int64_t rows, epcomm_cuda_parts* parts) {
    *parts = epcomm::window_parts(*row, rows);
}

int64_t epcomm_cuda_control_bytes(int32_t num_nodes, int32_t num_ranks, int32_t num_experts) {
    return epcomm::announced_offset({num_nodes, num_ranks, num_experts}) +
           num_ranks * int64_t(sizeof(epcomm_cuda_counter));
}

int64_t epcomm_cuda_announcement_offset(int32_t num_nodes, int32_t num_ranks, int32_t num_experts,
                                        int32_t rank, uint64_t epoch) {
    return epcomm::announcement_offset({num_nodes, num_ranks, num_experts}, rank, epoch);
}

int64_t epcomm_cuda_refused_offset(int32_t num_nodes, int32_t num_ranks, int32_t num_experts,
                                   int32_t rank) {
    return epcomm::refused_offset({num_nodes, num_ranks, num_experts}, rank);
}

int epcomm_cuda_load(void) {
    int error = epcomm::load_dispatch();
    if (error == 0) error = epcomm::load_combine();
    if (error == 0) error = epcomm::load_calibrate();
    if (error == 0) error = epcomm::load_clock();
    return error;
}

int epcomm_cuda_launch_dispatch(const epcomm_cuda_dispatch* call, epcomm_cuda_sequence* sequence,
                                void* stream) {
    const int error = epcomm::launch_dispatch(*call, static_cast<cudaStream_t>(stream));
    return error == 0 ? epcomm::leave(sequence, stream) : error;
}

int epcomm_cuda_launch_combine(const epcomm_cuda_combine* call, epcomm_cuda_sequence* sequence,
                               void* stream) {
    const int error = epcomm::launch_combine(*call, static_cast<cudaStream_t>(stream));
    return error == 0 ? epcomm::leave(sequence, stream) : error;
}

int epcomm_cuda_load_two_hop(void) {
    int error = epcomm::load_two_hop_layout();
    if (error == 0) error = epcomm::load_two_hop_dispatch();
    if (error == 0) error = epcomm::load_two_hop_combine();
    return error;
}

int epcomm_cuda_launch_two_hop_layout(const epcomm_cuda_two_hop_layout* call,
                                      epcomm_cuda_sequence* sequence, void* stream) {
    const int error = epcomm::launch_two_hop_layout(*call, static_cast<cudaStream_t>(stream));
    return error == 0 ? epcomm::leave(sequence, stream) : error;
}

int epcomm_cuda_launch_two_hop_dispatch(const epcomm_cuda_two_hop_dispatch* call,
                                        epcomm_cuda_sequence* sequence, void* stream) {
    const int error = epcomm::launch_two_hop_dispatch(*call, static_cast<cudaStream_t>(stream));
    return error == 0 ? epcomm::leave(sequence, stream) : error;
}

int epcomm_cuda_launch_two_hop_combine(const epcomm_cuda_two_hop_combine* call,
                                       epcomm_cuda_sequence* sequence, void* stream) {
    const int error = epcomm::launch_two_hop_combine(*call, static_cast<cudaStream_t>(stream));
    return error == 0 ? epcomm::leave(sequence, stream) : error;
}

int epcomm_cuda_copy(void* to, const void* from, uint64_t bytes, void* stream) {
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice,
                           static_cast<cudaStream_t>(stream));
}

int epcomm_cuda_launch_calibrate(const epcomm_cuda_calibrate* call, void* stream) {
    return epcomm::launch_calibrate(*call, static_cast<cudaStream_t>(stream));
}

int epcomm_cuda_versions(int32_t* driver, int32_t* runtime) {
    *driver = 0;
    *runtime = CUDART_VERSION;
    return cudaDriverGetVersion(driver);
}

const char* epcomm_cuda_error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

int epcomm_cuda_wait_prepared(const epcomm_cuda_report* report, uint64_t number,
                              int64_t timeout_ns) {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    const int64_t start = int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
    const int64_t deadline = start + timeout_ns;
    constexpr int64_t kLookEvery = 250000000, kSpin = 200000;
    int64_t look_at = start + kLookEvery;
    while (true) {
        for (int i = 0; i < 1024; ++i) {
            if (__atomic_load_n(&report->prepared, __ATOMIC_ACQUIRE) >= number) return 0;
        }
        if (__atomic_load_n(&report->failed, __ATOMIC_ACQUIRE) != 0) return 1;
        clock_gettime(CLOCK_MONOTONIC, &t);
        const int64_t now = int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
        if (now > deadline) return 2;
        // Longer than the kernel takes: it waits for a rank or for proxies, which may want this
        // core.
        if (now - start > kSpin) sched_yield();
        // A GPU that has failed, perhaps by another process's doing, reports nothing any more.
        if (now > look_at) {
            const int error = epcomm::gpu_error();
            if (error != cudaSuccess) return -error;
            look_at = now + kLookEvery;
        }
    }
}

}  // extern "C"
