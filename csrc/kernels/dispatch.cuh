// Dispatch: every copy of every token is stored once, at its final place in a peer's window. A
// first call finds these places before, in the same launch: its blocks meet twice on the way.
#pragma once

#include "call.cuh"
#include "layout.cuh"
#include "pack_bulk.cuh"
#include "pad.cuh"
#include "store_plain.cuh"

namespace epcomm {

constexpr int kMaxStages = 4;

/// What the host decided about shared memory.
struct DispatchPlan {
    Pieces pieces;
    int stages;
    int stage_bytes;   ///< of one stage
    int scale_bytes;   ///< of a warp's scales area
    int layout_warps;  ///< first call: of a block that count and place
};

/// Shared memory: targets | barriers | items | scales areas | stages (from the next 128 bytes). A
/// first call's layout has its counts where the stages come later.
__host__ __device__ inline int64_t stages_offset(const DispatchPlan& plan, int ranks, int warps) {
    return epcomm_align(int64_t(ranks) * sizeof(Target) +
                            int64_t(warps) * kMaxStages * (8 + sizeof(Item)) +
                            int64_t(warps) * plan.scale_bytes,
                        128);
}

/// Role: announce (block 0) and judge a call along routes that are known. False: gave up.
__device__ inline bool begin_cached(const epcomm_cuda_dispatch& call, uint64_t epoch,
                                    int* verdict) {
    const epcomm_cuda_world& world = call.world;
    const bool timed = blockIdx.x == 0 && threadIdx.x == 0;
    if (!announce_known(call, {call.announcement.op, EPCOMM_PHASE_ANNOUNCE, epoch})) return false;
    *verdict = judge_all(world, call.announcement, call.row, call.routes.rows, epoch);
    if (*verdict == EPCOMM_CUDA_OK) *verdict = judge_routes(call.routes);
    if (timed) report_verdict(world, *verdict, epoch, call.number);
    return true;
}

template <int packing, bool first>
__global__ void __launch_bounds__(512, 1)
    dispatch_kernel(const __grid_constant__ epcomm_cuda_dispatch call,
                    const __grid_constant__ DispatchPlan plan) {
    extern __shared__ __align__(128) uint8_t shared_bytes[];
    const epcomm_cuda_world& world = call.world;
    const int warps = int(blockDim.x >> 5);
    auto* targets = reinterpret_cast<Target*>(shared_bytes);
    auto* barriers = reinterpret_cast<uint64_t*>(targets + world.num_ranks);
    auto* items = reinterpret_cast<Item*>(barriers + warps * kMaxStages);
    uint8_t* areas = reinterpret_cast<uint8_t*>(items + warps * kMaxStages);
    auto* scales = reinterpret_cast<uint32_t*>(areas + warp_id() * plan.scale_bytes);
    uint8_t* stages = shared_bytes + stages_offset(plan, world.num_ranks, warps);
    for (int i = lane_id(); i < plan.scale_bytes / 4; i += 32) scales[i] = 0;

    const uint64_t epoch = begin_call(world);
    if (epoch == 0) return;
    if (blockIdx.x == 0 && threadIdx.x == 0) stamp(world, call.number, EPCOMM_CUDA_STAMP_START);
#if EPCOMM_BULK
    const Ring ring = {stages + warp_id() * plan.stages * plan.stage_bytes,
                       plan.stage_bytes,
                       plan.stages,
                       barriers + warp_id() * kMaxStages,
                       items + warp_id() * kMaxStages,
                       scales};
    if (lane_id() < kMaxStages) barrier_init(ring.loaded + lane_id());
    barrier_init_fence();
#endif
    int verdict = EPCOMM_CUDA_OK;
    if constexpr (first) {
        const LayoutShared layout(reinterpret_cast<int*>(stages), world.num_ranks,
                                  world.num_experts, plan.layout_warps, call.row.layout);
        if (!find_routes(call, layout, epoch, &verdict)) return;
#if EPCOMM_BULK
        // The copy engine writes where the counts were.
        proxy_fence();
        __syncthreads();
#endif
    } else {
        if (!begin_cached(call, epoch, &verdict)) return;
    }
    if (verdict == EPCOMM_CUDA_OK) {
        find_targets(call, epoch, targets);
        __syncthreads();
        clear_unused(call, targets[world.local_rank]);
        begin_role(world, EPCOMM_CUDA_ROLE_STORE);
#if EPCOMM_BULK
        if constexpr (packing == 0) {
            store_rows(call, targets, plan.pieces, ring);
        } else {
            pack_rows<packing == 2>(call, targets, plan.pieces, ring);
        }
#else
        store_rows_plain<packing>(call, targets, scales);
#endif
        end_role(world);
    }
    delay(world, kDelayMoved);
    if (!is_last_block(world)) return;
    note_moved(world, call.number);
    // All ranks come to the same verdict, so after a refusal nobody waits.
    if (verdict == EPCOMM_CUDA_OK) {
        const Waiting what = {call.announcement.op, EPCOMM_PHASE_ARRIVE, epoch};
        if (!meet_node(world, true, what)) return;
    }
    call_next();
    end_call(world, verdict, epoch, call.number, first);
}

}  // namespace epcomm
