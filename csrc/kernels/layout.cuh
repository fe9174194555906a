// First dispatch, before data: count, announce, wait for all announcements, place.
#pragma once

#include "bases.cuh"
#include "place.cuh"
#include "prepared.cuh"
#include "timeline.cuh"

namespace epcomm {

/// Shared memory, in ints. Layout expert needs every warp's expert counts, so that where there are
/// many experts only some of a block's warps count and place.
struct LayoutShared {
    int warps;          ///< that count and place
    int* warp_ranks;    ///< [warps][R]
    int* warp_experts;  ///< [warps or 1][E]
    int* counts;        ///< [R + E]
    int* base;          ///< [max(R, E)]
    int* rows;          ///< [R]

    __host__ __device__ static int64_t ints(int R, int E, int warps, int layout) {
        const int64_t experts = layout == EPCOMM_LAYOUT_EXPERT ? warps : 1;
        return int64_t(warps) * R + experts * E + R + E + (R > E ? R : E) + R;
    }

    __device__ LayoutShared(int* at, int R, int E, int num_warps, int layout) {
        warps = num_warps;
        warp_ranks = at;
        warp_experts = warp_ranks + warps * R;
        counts = warp_experts + (layout == EPCOMM_LAYOUT_EXPERT ? warps : 1) * E;
        base = counts + R + E;
        rows = base + max(R, E);
    }
};

/// Role: count this block's tokens and publish the sums to the rank's other blocks.
__device__ inline void count_block(const epcomm_cuda_dispatch& call, const LayoutShared& shared,
                                   const Share& share) {
    const int R = call.world.num_ranks, E = call.world.num_experts, warps = shared.warps;
    const bool by_expert = call.row.layout == EPCOMM_LAYOUT_EXPERT;
    const int expert_warps = by_expert ? warps : 1;
    for (int i = int(threadIdx.x); i < expert_warps * E; i += int(blockDim.x)) {
        shared.warp_experts[i] = 0;
    }
    __syncthreads();
    if (warp_id() < warps) {
        count_share(call, share, shared.warp_ranks + warp_id() * R,
                    shared.warp_experts + (by_expert ? warp_id() * E : 0));
    }
    __syncthreads();
    int32_t* sums = call.world.block_bins + int64_t(blockIdx.x) * (R + E);
    for (int i = int(threadIdx.x); i < R + E; i += int(blockDim.x)) {
        sums[i] = i < R ? column_sum(shared.warp_ranks + i, R, warps)
                        : column_sum(shared.warp_experts + i - R, E, expert_warps);
    }
}

/// Role (block 0): sum all blocks' counts and announce them.
__device__ inline void announce_counts(const epcomm_cuda_dispatch& call, const LayoutShared& shared,
                                       uint64_t epoch) {
    const int bins = call.world.num_ranks + call.world.num_experts;
    const bool bad = own_control(call.world)->bad_choice != INT32_MAX;
    for (int i = int(threadIdx.x); i < bins; i += int(blockDim.x)) {
        shared.counts[i] = column_sum(call.world.block_bins + i, bins, int(gridDim.x));
    }
    __syncthreads();
    announce(call.world, call.announcement,
             bad ? int(EPCOMM_STATUS_REFUSED) : call.announcement.status,
             {shared.counts, call.world.num_nodes, bins}, epoch);
}

/// Turn the per-warp counts into the first row of every warp's share, in place.
__device__ inline void scan_warps(const epcomm_cuda_dispatch& call, const LayoutShared& shared) {
    const int R = call.world.num_ranks, E = call.world.num_experts;
    const bool by_expert = call.row.layout == EPCOMM_LAYOUT_EXPERT;
    const int bins = by_expert ? E : R;
    int* per_warp = by_expert ? shared.warp_experts : shared.warp_ranks;
    for (int i = int(threadIdx.x); i < bins; i += int(blockDim.x)) {
        const int32_t* column = call.world.block_bins + (by_expert ? R : 0) + i;
        const int next = shared.base[i] + column_sum(column, R + E, int(blockIdx.x));
        scan_column(per_warp + i, bins, shared.warps, next);
    }
}

/// The first rows of this rank's copies at every rank, or expert; block 0 leaves in the handle how
/// many rows every rank holds.
__device__ inline void find_bases(const epcomm_cuda_dispatch& call, const LayoutShared& shared,
                                  uint64_t epoch) {
    const epcomm_cuda_world& world = call.world;
    const bool leads = blockIdx.x == 0;
    if (call.row.layout == EPCOMM_LAYOUT_EXPERT) {
        bases_by_expert(world, call.announcement.alignment, epoch, shared.rows, shared.base,
                        leads ? call.routes.group_start : nullptr, call.routes.group_count);
    } else {
        bases_by_rank(world, epoch, shared.rows, shared.base);
    }
    __syncthreads();
    if (!leads) return;
    for (int r = int(threadIdx.x); r < world.num_ranks; r += int(blockDim.x)) {
        call.routes.rows[r] = shared.rows[r];
    }
}

/// Role (block 0): leave in the handle how many rows this rank's experts get, and tell the host.
__device__ inline void tell_host(const epcomm_cuda_dispatch& call, int verdict, const int* rows,
                                 uint64_t epoch) {
    if (call.row.layout == EPCOMM_LAYOUT_RANK) {
        count_local_experts(call.world, epoch, call.routes.group_count);
    }
    report_prepared(call, verdict, rows, epoch);
}

/// Find the row of every copy, and tell the host how many rows come. False: gave up. Whatever the
/// verdict, all of a rank's blocks, and all ranks, come to the same. The whole block.
__device__ inline bool find_routes(const epcomm_cuda_dispatch& call, const LayoutShared& shared,
                                   uint64_t epoch, int* verdict) {
    const epcomm_cuda_world& world = call.world;
    const Waiting what = {call.announcement.op, EPCOMM_PHASE_ANNOUNCE, epoch};
    const Share share = warp_share(call.routes.num_tokens, shared.warps);
    const bool leads = blockIdx.x == 0, timed = leads && threadIdx.x == 0;

    begin_block_role(world, EPCOMM_CUDA_ROLE_COUNT);
    count_block(call, shared, share);
    end_block_role(world);
    delay(world, kDelayCounted);
    begin_block_role(world, EPCOMM_CUDA_ROLE_MEET);
    bool ok = meet(world, what);
    end_block_role(world);
    if (ok && leads) {
        delay(world, kDelayAnnounce);
        begin_block_role(world, EPCOMM_CUDA_ROLE_ANNOUNCE);
        announce_counts(call, shared, epoch);
        end_block_role(world);
    }
    if (timed) stamp(world, call.number, EPCOMM_CUDA_STAMP_COUNTED);
    begin_block_role(world, EPCOMM_CUDA_ROLE_LISTEN);
    ok = ok && wait_announced(world, epoch, what);
    end_block_role(world);
    if (timed) stamp(world, call.number, EPCOMM_CUDA_STAMP_ANNOUNCED);
    if (!ok) return false;
    delay(world, kDelayAnnounced);
    begin_role(world, EPCOMM_CUDA_ROLE_PLACE);
    find_bases(call, shared, epoch);
    *verdict = judge_all(world, call.announcement, call.row, shared.rows, epoch);
    if (*verdict != EPCOMM_CUDA_OK) {
        if (leads) tell_host(call, *verdict, shared.rows, epoch);
        return true;
    }
    scan_warps(call, shared);
    __syncthreads();
    if (warp_id() < shared.warps) {
        if (call.row.layout == EPCOMM_LAYOUT_EXPERT) {
            place_by_expert(call, share, shared.warp_experts + warp_id() * world.num_experts);
        } else {
            place_by_rank(call, share, shared.warp_ranks + warp_id() * world.num_ranks);
        }
    }
    end_role(world);
    delay(world, kDelayPlaced);
    begin_block_role(world, EPCOMM_CUDA_ROLE_MEET);
    // Any warp may come to move any token, so all places must be known. The host is told meanwhile.
    arrive(world, epoch, kPlaced);
    if (leads) tell_host(call, *verdict, shared.rows, epoch);
    ok = wait_blocks(world, kPlaced, what);
    end_block_role(world);
    if (timed) stamp(world, call.number, EPCOMM_CUDA_STAMP_PLACED);
    return ok;
}

}  // namespace epcomm
