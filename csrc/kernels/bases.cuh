// Layout, between the passes: from all ranks' counts to the first row of this source's copies.
#pragma once

#include "announce.cuh"

namespace epcomm {

/// rows[r] = rows rank r will hold (layout rank); base[r] = first row of this rank's copies there.
__device__ inline void bases_by_rank(const epcomm_cuda_world& world, uint64_t epoch, int* rows,
                                     int* base) {
    for (int r = int(threadIdx.x); r < world.num_ranks; r += int(blockDim.x)) {
        int total = 0;
        for (int s = 0; s < world.num_ranks; ++s) {
            if (s == world.rank) base[r] = total;
            total += rank_rows_of(world, announcement_from(world, s, epoch))[r];
        }
        rows[r] = total;
    }
}

/// Layout expert: every expert's group starts at a multiple of the alignment, in expert order.
/// base[e] = first row of this rank's copies for expert e at its rank; `starts` and `counts`
/// (E / R + 1 and E / R, null = not wanted) describe this rank's own groups. A warp per rank.
__device__ inline void bases_by_expert(const epcomm_cuda_world& world, int alignment,
                                       uint64_t epoch, int* rows, int* base, int32_t* starts,
                                       int32_t* counts) {
    const int R = world.num_ranks, per_rank = world.num_experts / R, lane = lane_id();
    for (int r = warp_id(); r < R; r += int(blockDim.x >> 5)) {
        int start = 0;
        for (int chunk = 0; chunk < per_rank; chunk += 32) {
            const int local = chunk + lane, expert = r * per_rank + local;
            int total = 0, before = 0;
            if (local < per_rank) {
                for (int s = 0; s < R; ++s) {
                    if (s == world.rank) before = total;
                    epcomm_announcement* theirs = announcement_from(world, s, epoch);
                    total += rank_rows_of(world, theirs)[R + expert];
                }
            }
            const int padded = (total + alignment - 1) / alignment * alignment;
            int sum = padded;  // inclusive prefix sum over the lanes
            for (int step = 1; step < 32; step *= 2) {
                const int lower = __shfl_up_sync(kWarp, sum, step);
                if (lane >= step) sum += lower;
            }
            if (local < per_rank) {
                base[expert] = start + sum - padded + before;
                if (r == world.rank && starts != nullptr) {
                    starts[local] = start + sum - padded;
                    counts[local] = total;
                }
            }
            start += __shfl_sync(kWarp, sum, 31);
        }
        if (lane == 0) {
            rows[r] = start;
            if (r == world.rank && starts != nullptr) starts[per_rank] = start;
        }
    }
}

/// Rows of this rank's local experts without padding (layout rank; bases_by_expert has its own).
__device__ inline void count_local_experts(const epcomm_cuda_world& world, uint64_t epoch,
                                           int32_t* counts) {
    const int R = world.num_ranks, per_rank = world.num_experts / R;
    for (int local = int(threadIdx.x); local < per_rank; local += int(blockDim.x)) {
        int total = 0;
        for (int s = 0; s < R; ++s) {
            total += rank_rows_of(
                world, announcement_from(world, s, epoch))[R + world.rank * per_rank + local];
        }
        counts[local] = total;
    }
}

}  // namespace epcomm
