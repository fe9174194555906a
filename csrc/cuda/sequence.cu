// The order of a buffer's calls over streams and graph captures.
#include <cuda_runtime.h>

#include "epcomm_cuda.h"

namespace epcomm {
namespace {

int find_capture(cudaStream_t stream, uint64_t* capture) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &id);
    *capture = status == cudaStreamCaptureStatusActive ? uint64_t(id) : 0;
    return error;
}

}  // namespace

/// Remember that the last call is the one just launched on `stream`.
int leave(epcomm_cuda_sequence* sequence, void* stream) {
    uint64_t capture = 0;
    int error = find_capture(static_cast<cudaStream_t>(stream), &capture);
    if (error != 0) return error;
    const int inside = capture != 0;
    error = cudaEventRecord(static_cast<cudaEvent_t>(sequence->done[inside]),
                            static_cast<cudaStream_t>(stream));
    sequence->stream[inside] = stream;
    sequence->used[inside] = 1;
    if (inside) sequence->capture = capture;
    return error;
}

}  // namespace epcomm

extern "C" {

int epcomm_cuda_sequence_open(epcomm_cuda_sequence* sequence) {
    *sequence = {};
    for (void*& done : sequence->done) {
        cudaEvent_t event;
        const cudaError_t error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
        if (error != cudaSuccess) return error;
        done = event;
    }
    return cudaSuccess;
}

void epcomm_cuda_sequence_close(epcomm_cuda_sequence* sequence) {
    for (void*& done : sequence->done) {
        if (done != nullptr) cudaEventDestroy(static_cast<cudaEvent_t>(done));
        done = nullptr;
    }
}

int epcomm_cuda_enter(epcomm_cuda_sequence* sequence, void* stream, uint64_t* capture) {
    const int error = epcomm::find_capture(static_cast<cudaStream_t>(stream), capture);
    if (error != 0) return error;
    const int inside = *capture != 0;
    if (!sequence->used[inside] || sequence->stream[inside] == stream) return cudaSuccess;
    if (inside && sequence->capture != *capture) return cudaSuccess;
    return cudaStreamWaitEvent(static_cast<cudaStream_t>(stream),
                               static_cast<cudaEvent_t>(sequence->done[inside]), 0);
}

}  // extern "C"
