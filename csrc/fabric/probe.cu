// Kernels that produce triggers: one that checks what arrives, one that measures.
#include <cuda_runtime.h>

#include "measure.h"

namespace {

using namespace epcomm;

/// A word that says whose it is and of which run.
__device__ uint64_t word_of(const epcomm_fabric_probe& probe, int32_t node, uint64_t word) {
    return probe.epoch << 48 ^ uint64_t(node) << 40 ^ word;
}

__device__ void count(uint64_t* result, int which, uint64_t amount) {
    if (amount != 0) atomicAdd(reinterpret_cast<unsigned long long*>(&result[which]), amount);
}

__device__ void finish(const epcomm_fabric_probe& probe, int64_t ns) {
    count(probe.result, 1, ns < 0);
    if (ns >= 0) {
        atomicMax(reinterpret_cast<unsigned long long*>(&probe.result[2]),
                  static_cast<unsigned long long>(ns));
    }
}

__device__ bool wait_signal(const epcomm_fabric_probe& probe, int32_t channel) {
    const uint64_t expected = probe.epoch * uint64_t(probe.num_chunks / probe.num_channels);
    const int64_t start = fabric::now_ns();
    while (fabric::load_acquire(&probe.signals[probe.their_signal + channel]) < expected) {
        if (fabric::failed(probe.fabric) || fabric::now_ns() - start > probe.timeout_ns) {
            return false;
        }
        fabric::relax();
    }
    return true;
}

__global__ void exchange(const __grid_constant__ epcomm_fabric_probe probe) {
    const uint64_t words = probe.bytes / sizeof(uint64_t);
    for (int32_t chunk = int32_t(blockIdx.x); chunk < probe.num_chunks;
         chunk += int32_t(gridDim.x)) {
        const uint64_t first = uint64_t(chunk) * words;
        for (uint64_t w = threadIdx.x; w < words; w += blockDim.x) {
            probe.out[first + w] = word_of(probe, probe.fabric.node, first + w);
        }
        // After the barrier thread 0's release covers the block's stores.
        __syncthreads();
        if (threadIdx.x != 0) continue;
        const int32_t channel = chunk % probe.num_channels;
        epcomm_fabric_place remote = probe.remote, local = probe.local;
        remote.offset += uint64_t(chunk) * probe.bytes;
        local.offset += uint64_t(chunk) * probe.bytes;
        const fabric::Ticket ticket =
            fabric::put_signal(probe.fabric, {probe.peer, channel}, remote, local, probe.bytes,
                               probe.first_signal + channel);
        count(probe.result, 1, ticket == 0);
    }
    for (int32_t chunk = int32_t(blockIdx.x); chunk < probe.num_chunks;
         chunk += int32_t(gridDim.x)) {
        // Every thread reads the counter itself: its acquire is what lets it read the chunk.
        const bool arrived = wait_signal(probe, chunk % probe.num_channels);
        count(probe.result, 1, !arrived);
        const uint64_t first = uint64_t(chunk) * words;
        uint64_t different = 0;
        for (uint64_t w = threadIdx.x; arrived && w < words; w += blockDim.x) {
            const uint64_t seen = fabric::load_relaxed(&probe.in[first + w]);
            different += seen != word_of(probe, probe.peer, first + w);
        }
        count(probe.result, 0, different);
    }
}

__global__ void triggers(const __grid_constant__ epcomm_fabric_probe probe) {
    const int32_t producer = int32_t(blockIdx.x * blockDim.x + threadIdx.x);
    const int64_t ns =
        fabric::measure_triggers(probe.fabric, {probe.peer, producer % probe.num_channels},
                                 probe.triggers, probe.round_trip != 0, probe.timeout_ns);
    finish(probe, ns);
}

__global__ void ping(const __grid_constant__ epcomm_fabric_probe probe) {
    const int64_t ns = fabric::measure_ping(probe.fabric, {probe.peer, 0}, probe.first_signal,
                                            &probe.signals[probe.their_signal], probe.epoch,
                                            probe.triggers, probe.leads != 0, probe.timeout_ns);
    finish(probe, ns);
}

}  // namespace

extern "C" {

int epcomm_fabric_probe_exchange(const epcomm_fabric_probe* probe, void* stream) {
    exchange<<<probe->num_blocks, probe->num_threads, 0, static_cast<cudaStream_t>(stream)>>>(
        *probe);
    return cudaGetLastError();
}

int epcomm_fabric_probe_triggers(const epcomm_fabric_probe* probe, void* stream) {
    triggers<<<probe->num_blocks, probe->num_threads, 0, static_cast<cudaStream_t>(stream)>>>(
        *probe);
    return cudaGetLastError();
}

int epcomm_fabric_probe_ping(const epcomm_fabric_probe* probe, void* stream) {
    ping<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(*probe);
    return cudaGetLastError();
}

}  // extern "C"
