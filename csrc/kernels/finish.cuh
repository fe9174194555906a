// How a kernel's blocks meet: once all have counted, and when the last one leaves.
#pragma once

#include "announce.cuh"
#include "delay.cuh"

namespace epcomm {

/// Where the blocks of a launch meet, in this order; all are resident, the host saw to that.
enum Meeting { kCounted = 0, kPlaced = 1, kMeetings = 2 };

/// This block has come to a meeting. What it stored is seen by those that wait for the others.
__device__ inline void arrive(const epcomm_cuda_world& world, uint64_t epoch, Meeting meeting) {
    epcomm_cuda_control* own = own_control(world);
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence();
    // atomicInc returns to 0 by itself after the last block.
    if (atomicInc(&own->counting, gridDim.x - 1) == gridDim.x - 1) {
        __threadfence();
        store_release(&own->counted.value, epoch * kMeetings + meeting);
    }
}

/// Wait until all blocks have come. The whole block.
__device__ inline bool wait_blocks(const epcomm_cuda_world& world, Meeting meeting,
                                   const Waiting& what) {
    __shared__ bool ok;
    if (threadIdx.x == 0) {
        ok = wait_counter(world, &own_control(world)->counted.value,
                          what.epoch * kMeetings + meeting, world.rank, what);
    }
    __syncthreads();
    return ok;
}

/// All blocks of the launch meet, once an epoch.
__device__ inline bool meet(const epcomm_cuda_world& world, const Waiting& what) {
    arrive(world, what.epoch, kCounted);
    return wait_blocks(world, kCounted, what);
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

/// Raise this rank's counter at every rank of the node to `epoch` (release). One block.
__device__ inline void signal_node(const epcomm_cuda_world& world, bool arrived, uint64_t epoch) {
    for (int l = int(threadIdx.x); l < world.num_local; l += int(blockDim.x)) {
        epcomm_cuda_control* peer = world.controls[l];
        epcomm_cuda_counter* counters = arrived ? peer->arrived : peer->released;
        store_release(&counters[world.local_rank].value, epoch);
    }
}

/// Note the time, for whoever asks later. One thread.
__device__ inline void stamp(const epcomm_cuda_world& world, uint64_t call,
                             epcomm_cuda_stamp which) {
    epcomm_cuda_times& times = own_control(world)->times[call % EPCOMM_CUDA_TIMED_CALLS];
    if (which == EPCOMM_CUDA_STAMP_START) times.call = call;
    times.at[which] = now_ns();
}

/// Count the call as finished, moved or refused. One thread of the last block.
__device__ inline void finish_epoch(const epcomm_cuda_world& world, uint64_t epoch) {
    store_relaxed(&own_control(world)->epoch.value, epoch);
}

/// Tell the host the verdict on call `number`, before it ends. One thread.
__device__ inline void report_verdict(const epcomm_cuda_world& world, int verdict, uint64_t epoch,
                                      uint64_t number) {
    world.report->epoch = epoch;
    world.report->verdict = verdict;
    constexpr int kMost = (1 << EPCOMM_CUDA_FREE_BITS) - 1;
    const int free = min(fewest_free_windows(world, epoch), kMost);
    store_relaxed(&world.report->free_windows, number << EPCOMM_CUDA_FREE_BITS | uint64_t(free));
    store_release(&world.report->prepared, number);
}

/// Tell the host that the call's announcements ended it before data moved. The whole last block.
/// What the host has not seen yet is not written over: the first refusal is the cause of those
/// after it.
__device__ inline void report_refusal(const epcomm_cuda_world& world, int verdict, uint64_t epoch,
                                      int bad_choice) {
    // Hosts that have to make windows wait for the verdict; they repeat the call.
    if (verdict == EPCOMM_CUDA_GROW) return;
    epcomm_cuda_report* report = world.report;
    const uint64_t refusals = load_relaxed(&report->refusals);
    const bool first = __syncthreads_and(load_relaxed(&report->acknowledged) == refusals);
    if (first) {
        constexpr int kWords = int(sizeof(epcomm_announcement) / 4);
        for (int r = 0; r < world.num_ranks; ++r) {
            const auto* from =
                reinterpret_cast<const uint32_t*>(announcement_from(world, r, epoch));
            auto* to = reinterpret_cast<uint32_t*>(reinterpret_cast<uint8_t*>(own_control(world)) +
                                                   refused_offset(size_of(world), r));
            for (int i = int(threadIdx.x); i < kWords; i += int(blockDim.x)) to[i] = from[i];
        }
        __threadfence_system();
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (first) {
        report->refused_epoch = epoch;
        report->refused_verdict = verdict;
        report->refused_choice = bad_choice;
    }
    __threadfence_system();
    store_release(&report->refusals, refusals + 1);
}

}  // namespace epcomm
