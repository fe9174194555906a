// First call, before data: count, announce, wait for all announcements, place.
#include "bases.cuh"
#include "finish.cuh"
#include "launch.cuh"
#include "place.cuh"
#include "prepared.cuh"

namespace epcomm {

/// Shared memory of the kernel, in ints. Layout expert needs every warp's expert counts.
struct LayoutShared {
    int* warp_ranks;    ///< [warps][R]
    int* warp_experts;  ///< [warps or 1][E]
    int* counts;        ///< [R + E]
    int* base;          ///< [max(R, E)]
    int* rows;          ///< [R]

    __host__ __device__ static int64_t ints(int R, int E, int warps, int layout) {
        const int64_t experts = layout == EPCOMM_LAYOUT_EXPERT ? warps : 1;
        return int64_t(warps) * R + experts * E + R + E + (R > E ? R : E) + R;
    }

    __device__ LayoutShared(int* at, int R, int E, int warps, int layout) {
        warp_ranks = at;
        warp_experts = warp_ranks + warps * R;
        counts = warp_experts + (layout == EPCOMM_LAYOUT_EXPERT ? warps : 1) * E;
        base = counts + R + E;
        rows = base + max(R, E);
    }
};

/// Role: count this block's tokens and publish the sums to the rank's other blocks.
__device__ inline void count_block(const epcomm_cuda_layout& call, const LayoutShared& shared) {
    const int R = call.world.num_ranks, E = call.world.num_experts;
    const int warps = int(blockDim.x >> 5);
    const bool by_expert = call.row.layout == EPCOMM_LAYOUT_EXPERT;
    const int expert_warps = by_expert ? warps : 1;
    for (int i = int(threadIdx.x); i < expert_warps * E; i += int(blockDim.x)) {
        shared.warp_experts[i] = 0;
    }
    __syncthreads();
    count_share(call, shared.warp_ranks + warp_id() * R,
                shared.warp_experts + (by_expert ? warp_id() * E : 0));
    __syncthreads();
    int32_t* sums = call.world.block_bins + int64_t(blockIdx.x) * (R + E);
    for (int i = int(threadIdx.x); i < R + E; i += int(blockDim.x)) {
        int sum = 0;
        if (i < R) {
            for (int w = 0; w < warps; ++w) sum += shared.warp_ranks[w * R + i];
        } else {
            for (int w = 0; w < expert_warps; ++w) sum += shared.warp_experts[w * E + i - R];
        }
        sums[i] = sum;
    }
}

/// Role (block 0): sum all blocks' counts and announce them.
__device__ inline void announce_counts(const epcomm_cuda_layout& call, const LayoutShared& shared,
                                       uint64_t epoch) {
    const int bins = call.world.num_ranks + call.world.num_experts;
    for (int i = int(threadIdx.x); i < bins; i += int(blockDim.x)) {
        int sum = 0;
        for (int b = 0; b < int(gridDim.x); ++b) {
            sum += call.world.block_bins[int64_t(b) * bins + i];
        }
        shared.counts[i] = sum;
    }
    __syncthreads();
    const bool bad = own_control(call.world)->bad_choice != INT32_MAX;
    announce(call.world, call.announcement,
             bad ? int(EPCOMM_STATUS_REFUSED) : call.announcement.status,
             {shared.counts, call.world.num_nodes, bins}, epoch);
}

/// Turn the per-warp counts into the first row of every warp's share, in place.
__device__ inline void scan_warps(const epcomm_cuda_layout& call, const LayoutShared& shared) {
    const int R = call.world.num_ranks, E = call.world.num_experts;
    const bool by_expert = call.row.layout == EPCOMM_LAYOUT_EXPERT;
    const int bins = by_expert ? E : R;
    int* per_warp = by_expert ? shared.warp_experts : shared.warp_ranks;
    for (int i = int(threadIdx.x); i < bins; i += int(blockDim.x)) {
        int next = shared.base[i];
        for (int b = 0; b < int(blockIdx.x); ++b) {
            next += call.world.block_bins[int64_t(b) * (R + E) + (by_expert ? R : 0) + i];
        }
        for (int w = 0; w < int(blockDim.x >> 5); ++w) {
            const int count = per_warp[w * bins + i];
            per_warp[w * bins + i] = next;
            next += count;
        }
    }
}

__global__ void __launch_bounds__(256, 1)
    layout_kernel(const __grid_constant__ epcomm_cuda_layout call) {
    extern __shared__ int shared_ints[];
    const epcomm_cuda_world& world = call.world;
    const int R = world.num_ranks;
    const bool by_expert = call.row.layout == EPCOMM_LAYOUT_EXPERT;
    const LayoutShared shared(shared_ints, R, world.num_experts, int(blockDim.x >> 5),
                              call.row.layout);
    const uint64_t epoch = begin_call(world);
    if (epoch == 0) return;
    const Waiting what = {call.announcement.op, EPCOMM_PHASE_ANNOUNCE, epoch};
    const bool leads = blockIdx.x == 0, timed = leads && threadIdx.x == 0;

    if (timed) stamp(world, call.number, EPCOMM_CUDA_STAMP_START);
    count_block(call, shared);
    delay(world, kDelayCounted);
    bool ok = meet(world, what);
    if (ok && leads) {
        delay(world, kDelayAnnounce);
        announce_counts(call, shared, epoch);
    }
    if (timed) stamp(world, call.number, EPCOMM_CUDA_STAMP_COUNTED);
    ok = ok && wait_announced(world, epoch, what);
    if (timed) stamp(world, call.number, EPCOMM_CUDA_STAMP_ANNOUNCED);
    if (ok) {
        delay(world, kDelayAnnounced);
        if (by_expert) {
            bases_by_expert(world, call.announcement.alignment, epoch, shared.rows, shared.base,
                            leads ? call.routes.group_start : nullptr, call.routes.group_count);
        } else {
            bases_by_rank(world, epoch, shared.rows, shared.base);
            if (leads) count_local_experts(world, epoch, call.routes.group_count);
        }
        __syncthreads();
        scan_warps(call, shared);
        __syncthreads();
    }
    if (ok && leads) {
        for (int r = int(threadIdx.x); r < R; r += int(blockDim.x))
            call.routes.rows[r] = shared.rows[r];
        const int verdict = judge_all(world, call.announcement, call.row, shared.rows, epoch);
        report_prepared(call, verdict, shared.rows, epoch);
    }
    if (!ok) return;
    if (by_expert) {
        place_by_expert(call, shared.warp_experts + warp_id() * world.num_experts);
    } else {
        place_by_rank(call, shared.warp_ranks + warp_id() * R);
    }
}

int launch_layout(const epcomm_cuda_layout& call, cudaStream_t stream) {
    const int R = call.world.num_ranks, E = call.world.num_experts;
    int warps = 8;
    while (warps > 1 && 4 * LayoutShared::ints(R, E, warps, call.row.layout) > kSharedLimit) {
        warps /= 2;
    }
    const int64_t bytes = 4 * LayoutShared::ints(R, E, warps, call.row.layout);
    if (bytes > kSharedLimit || call.num_blocks < 1) return cudaErrorInvalidValue;
    return launch(layout_kernel, call, call.num_blocks, 32 * warps, bytes, stream);
}

int load_layout() { return load(layout_kernel); }

}  // namespace epcomm
