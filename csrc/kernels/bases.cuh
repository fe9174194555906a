// Layout, between the passes: from all ranks' counts to the first row of this source's copies.
#pragma once

#include "announce.cuh"

namespace epcomm {

/// Inclusive sum over the lanes up to this one. The whole warp.
__device__ __forceinline__ int sum_to_lane(int value) {
    for (int step = 1; step < 32; step *= 2) {
        const int lower = __shfl_up_sync(kWarp, value, step);
        if (lane_id() >= step) value += lower;
    }
    return value;
}

/// What `source` announced of its rows, by rank and then by expert.
__device__ __forceinline__ const int32_t* rows_from(const epcomm_cuda_world& world, int source,
                                                    uint64_t epoch) {
    return rank_rows_of(world, announcement_from(world, source, epoch));
}

/// The sum over all sources of entry `i`. Every source, in order, is shown to `visit(source, sum)`
/// with the sum over those below it.
template <class Visit>
__device__ __forceinline__ int sum_of_sources(const epcomm_cuda_world& world, uint64_t epoch, int i,
                                              Visit&& visit) {
    constexpr int kTogether = 8;  // loads under way
    int total = 0;
    for (int first = 0; first < world.num_ranks; first += kTogether) {
        int value[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
            const int s = first + j;
            value[j] = s < world.num_ranks ? rows_from(world, s, epoch)[i] : 0;
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
            if (first + j < world.num_ranks) visit(first + j, total);
            total += value[j];
        }
    }
    return total;
}

/// The same; `before`: the sum over the ranks below this one.
__device__ inline int sum_of_sources(const epcomm_cuda_world& world, uint64_t epoch, int i,
                                     int* before) {
    return sum_of_sources(world, epoch, i, [&](int source, int sum) {
        if (source == world.rank) *before = sum;
    });
}

/// rows[r] = rows rank r will hold (layout rank); base[r] = first row of this rank's copies there.
/// A warp per rank, a lane per source.
__device__ inline void bases_by_rank(const epcomm_cuda_world& world, uint64_t epoch, int* rows,
                                     int* base) {
    const int R = world.num_ranks, lane = lane_id();
    for (int r = warp_id(); r < R; r += int(blockDim.x >> 5)) {
        int total = 0;
        for (int first = 0; first < R; first += 32) {
            const int s = first + lane;
            const int count = s < R ? rows_from(world, s, epoch)[r] : 0;
            const int sum = sum_to_lane(count);
            if (s == world.rank) base[r] = total + sum - count;
            total += __shfl_sync(kWarp, sum, 31);
        }
        if (lane == 0) rows[r] = total;
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
            if (local < per_rank) total = sum_of_sources(world, epoch, R + expert, &before);
            const int padded = (total + alignment - 1) / alignment * alignment;
            const int sum = sum_to_lane(padded);
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
        const int expert = world.rank * per_rank + local;
        counts[local] = sum_of_sources(world, epoch, R + expert, [](int, int) {});
    }
}

}  // namespace epcomm
