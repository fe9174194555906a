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
    if (!inside && sequence->next != nullptr) sequence->done[0] = sequence->next;
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
    return epcomm_cuda_event_open(&sequence->done[1]);
}

void epcomm_cuda_sequence_close(epcomm_cuda_sequence* sequence) {
    if (sequence->done[1] != nullptr) epcomm_cuda_event_close(sequence->done[1]);
    *sequence = {};
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

int epcomm_cuda_order(void* first, void* then) {
    void* event = nullptr;
    int error = epcomm_cuda_event_open(&event);
    if (error != cudaSuccess) return error;
    error = epcomm_cuda_event_record(event, first);
    if (error == cudaSuccess) error = epcomm_cuda_event_wait(event, then);
    epcomm_cuda_event_close(event);  // freed once it has happened
    return error;
}

int epcomm_cuda_event_open(void** event) {
    cudaEvent_t made = nullptr;
    const cudaError_t error = cudaEventCreateWithFlags(&made, cudaEventDisableTiming);
    *event = made;
    return error;
}

int epcomm_cuda_event_close(void* event) {
    return cudaEventDestroy(static_cast<cudaEvent_t>(event));
}

int epcomm_cuda_event_record(void* event, void* stream) {
    return cudaEventRecord(static_cast<cudaEvent_t>(event), static_cast<cudaStream_t>(stream));
}

int epcomm_cuda_event_wait(void* event, void* stream) {
    return cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), static_cast<cudaEvent_t>(event),
                               0);
}

int epcomm_cuda_event_query(void* event) {
    const cudaError_t error = cudaEventQuery(static_cast<cudaEvent_t>(event));
    if (error == cudaErrorNotReady) cudaGetLastError();  // not the next launch's error
    return error;
}

}  // extern "C"
