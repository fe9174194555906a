// How a kernel's blocks meet: once all have counted, and when the last one leaves.
#pragma once

#include "wait.cuh"

namespace epcomm {

/// All blocks of the launch meet (once an epoch; all are resident, the host saw to that).
__device__ inline bool meet(const epcomm_cuda_world& world, const Waiting& what) {
    __shared__ bool ok;
    epcomm_cuda_control* own = own_control(world);
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        // atomicInc returns to 0 by itself after the last block.
        if (atomicInc(&own->counting, gridDim.x - 1) == gridDim.x - 1) {
            __threadfence();
            store_release(&own->counted.value, what.epoch);
        }
        ok = wait_counter(world, &own->counted.value, what.epoch, world.rank, what);
    }
    __syncthreads();
    return ok;
}

/// Called by every block when its work is done. True in the last one, which then sees what all
/// blocks did and may signal on their behalf.
__device__ inline bool is_last_block(const epcomm_cuda_world& world) {
    __shared__ bool last;
    // Fences are cumulative: through the barrier, thread 0 releases what its whole block stored.
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicInc(&own_control(world)->leaving, gridDim.x - 1) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    return last;
}

/// Raise this rank's counter at every rank to `epoch` (release). One block.
__device__ inline void signal_all(const epcomm_cuda_world& world, bool arrived, uint64_t epoch) {
    for (int r = int(threadIdx.x); r < world.num_ranks; r += int(blockDim.x)) {
        epcomm_cuda_control* peer = world.controls[r];
        epcomm_cuda_counter* counters = arrived ? peer->arrived : peer->released;
        store_release(&counters[world.rank].value, epoch);
    }
}

/// Note the time, for whoever asks later. One thread.
__device__ inline void stamp(const epcomm_cuda_world& world, epcomm_cuda_stamp which) {
    own_control(world)->stamps[which] = now_ns();
}

/// Count the call as finished, moved or refused. One thread of the last block.
__device__ inline void finish_epoch(const epcomm_cuda_world& world, uint64_t epoch) {
    store_relaxed(&own_control(world)->epoch.value, epoch);
}

/// Tell the host that the call's announcements ended it before data moved. One thread.
__device__ inline void report_refusal(const epcomm_cuda_world& world, int verdict, uint64_t epoch) {
    world.report->refused_verdict = verdict;
    __threadfence_system();
    store_release(&world.report->refused, epoch);
}

}  // namespace epcomm
