// Kernels of writers whose posting rate is measured.
#include <cuda_runtime.h>

#include "posting_rate.h"

namespace {

using namespace epcomm::fabric;

/// From the first that begins to the last that ends: all by the timer of one GPU.
__device__ void note(uint64_t* result, bool ok, const PostingSpan& span) {
    auto* words = reinterpret_cast<unsigned long long*>(result);
    if (!ok) {
        atomicAdd(&words[0], 1ull);
        return;
    }
    atomicMin(&words[1], static_cast<unsigned long long>(span.begin));
    atomicMax(&words[2], static_cast<unsigned long long>(span.posted));
    atomicMax(&words[3], static_cast<unsigned long long>(span.completed));
}

/// Counted over all channels.
__device__ int32_t this_warp(const epcomm_posting_probe& probe) {
    return int32_t(blockIdx.x) * probe.num_warps + int32_t(threadIdx.x / 32);
}

template <class Fabric>
__global__ void post(const __grid_constant__ Fabric fabric,
                     const __grid_constant__ epcomm_posting_probe probe) {
    if (threadIdx.x % 32 != 0) return;
    PostingSpan span{};
    const bool ok = post_puts(fabric, probe, this_warp(probe), &span);
    note(probe.result, ok, span);
}

template <class Unread>
__global__ void post_unread(const __grid_constant__ epcomm_posting_probe probe) {
    if (threadIdx.x % 32 != 0) return;
    const int32_t warp = this_warp(probe);
    PostingSpan span{};
    write_unread(probe, warp, static_cast<Unread*>(probe.unread) + warp, &span);
    note(probe.result, true, span);
}

bool is_direct(int32_t kind) { return kind == EPCOMM_FABRIC_KIND_IBGDA; }

}  // namespace

extern "C" {

int epcomm_fabric_probe_posting(const epcomm_posting_probe* probe, void* stream) {
    const auto blocks = unsigned(probe->num_channels), threads = unsigned(probe->num_warps) * 32;
    auto* on = static_cast<cudaStream_t>(stream);
    if (is_direct(probe->kind)) {
        post<<<blocks, threads, 0, on>>>(probe->ibgda, *probe);
    } else {
        post<<<blocks, threads, 0, on>>>(probe->fabric, *probe);
    }
    return cudaGetLastError();
}

int epcomm_fabric_probe_unread(const epcomm_posting_probe* probe, void* stream) {
    const auto blocks = unsigned(probe->num_channels), threads = unsigned(probe->num_warps) * 32;
    auto* on = static_cast<cudaStream_t>(stream);
    if (is_direct(probe->kind)) {
        post_unread<UnreadQueue><<<blocks, threads, 0, on>>>(*probe);
    } else {
        post_unread<UnreadRing><<<blocks, threads, 0, on>>>(*probe);
    }
    return cudaGetLastError();
}

int64_t epcomm_fabric_probe_unread_bytes(int32_t kind, int32_t num_warps) {
    return num_warps * int64_t(is_direct(kind) ? sizeof(UnreadQueue) : sizeof(UnreadRing));
}

}  // extern "C"
