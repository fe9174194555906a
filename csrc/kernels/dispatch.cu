// Dispatch, data: every copy of every token is stored once, at its final place in a peer's window.
#include "finish.cuh"
#include "launch.cuh"
#include "pad.cuh"
#include "store_bulk.cuh"
#include "store_plain.cuh"

namespace epcomm {

constexpr int kMaxStages = 4;

/// What the host decided about shared memory.
struct DispatchPlan {
    Pieces pieces;
    int stages;
    int stage_bytes;  ///< of one stage
    int scale_bytes;  ///< of a warp's scales area
};

/// Shared memory: targets | barriers | items | scales areas | stages (from the next 128 bytes).
__host__ __device__ inline int64_t dispatch_shared(const DispatchPlan& plan, int ranks, int warps) {
    return epcomm_align(int64_t(ranks) * sizeof(Target) +
                            int64_t(warps) * kMaxStages * (8 + sizeof(Item)) +
                            int64_t(warps) * plan.scale_bytes,
                        128) +
           int64_t(warps) * plan.stages * plan.stage_bytes;
}

template <int packing>
__global__ void __launch_bounds__(512, 1)
    dispatch_kernel(const __grid_constant__ epcomm_cuda_dispatch call,
                    const __grid_constant__ DispatchPlan plan) {
    extern __shared__ __align__(128) uint8_t shared[];
    const epcomm_cuda_world& world = call.world;
    const int warps = int(blockDim.x >> 5);
    auto* targets = reinterpret_cast<Target*>(shared);
    auto* barriers =
        reinterpret_cast<uint64_t*>(targets + world.num_ranks) + warp_id() * kMaxStages;
    auto* items = reinterpret_cast<Item*>(reinterpret_cast<uint64_t*>(targets + world.num_ranks) +
                                          warps * kMaxStages);
    uint8_t* areas = reinterpret_cast<uint8_t*>(items + warps * kMaxStages);
    auto* scales = reinterpret_cast<uint32_t*>(areas + warp_id() * plan.scale_bytes);
    for (int i = lane_id(); i < plan.scale_bytes / 4; i += 32) scales[i] = 0;

    const uint64_t epoch = begin_call(world);
    if (epoch == 0) return;
    const bool timed = blockIdx.x == 0 && threadIdx.x == 0;
    if (timed) {
        stamp(world, call.number,
              call.announce ? EPCOMM_CUDA_STAMP_START : EPCOMM_CUDA_STAMP_PLACED);
    }
    if (call.announce && blockIdx.x == 0) {
        delay(world, kDelayAnnounce);
        announce(world, call.announcement, call.announcement.status, {}, epoch);
    }
#if EPCOMM_BULK
    uint8_t* stages = shared + epcomm_align(areas + warps * plan.scale_bytes - shared, 128) +
                      warp_id() * plan.stages * plan.stage_bytes;
    const Ring ring = {
        stages, plan.stage_bytes, plan.stages, barriers, items + warp_id() * kMaxStages, scales};
    if (lane_id() < kMaxStages) barrier_init(barriers + lane_id());
    barrier_init_fence();
#endif
    Waiting what = {call.announcement.op, EPCOMM_PHASE_ANNOUNCE, epoch};
    if (!wait_announced(world, epoch, what)) return;
    if (timed && call.announce) stamp(world, call.number, EPCOMM_CUDA_STAMP_ANNOUNCED);
    delay(world, kDelayAnnounced);
    int verdict = judge_all(world, call.announcement, call.row, call.routes.rows, epoch);
    if (call.announce && verdict == EPCOMM_CUDA_OK) verdict = judge_routes(call.routes);
    if (call.announce && timed) report_verdict(world, verdict, epoch, call.number);
    if (verdict == EPCOMM_CUDA_OK) {
        find_targets(call, epoch, targets);
        __syncthreads();
        clear_unused(call, targets[world.local_rank]);
#if EPCOMM_BULK
        store_rows<packing>(call, targets, plan.pieces, ring);
#else
        store_rows_plain<packing>(call, targets, scales);
#endif
    }
    delay(world, kDelayMoved);
    if (!is_last_block(world)) return;
    if (threadIdx.x == 0) {
        collect_deck(world);
        stamp(world, call.number, EPCOMM_CUDA_STAMP_MOVED);
    }
    // All ranks come to the same verdict, so after a refusal nobody waits.
    if (verdict == EPCOMM_CUDA_OK) {
        delay(world, kDelaySignal);
        signal_node(world, true, epoch);
        what.phase = EPCOMM_PHASE_ARRIVE;
        if (!wait_node(world, own_control(world)->arrived, epoch, what)) return;
    }
    delay(world, kDelayFinish);
    if (verdict != EPCOMM_CUDA_OK) {
        report_refusal(world, verdict, epoch, call.announce ? -1 : world.report->bad_choice);
    }
    if (threadIdx.x == 0) {
        finish_epoch(world, epoch);
        stamp(world, call.number, EPCOMM_CUDA_STAMP_END);
    }
}

/// Cut rows so that every warp has a piece in shared memory, in as many stages as fit.
DispatchPlan plan_dispatch(const epcomm_cuda_dispatch& call, int packing) {
    const int element = packing == 2 ? 4 : packing == 1 ? 2 : 1;
    const int unit = packing == 0 ? EPCOMM_LIMIT_record_align : EPCOMM_LIMIT_tile * element;
    DispatchPlan plan;
    plan.scale_bytes = packing == 0 ? 0 : call.row.scale_bytes;
    plan.stages = call.stages < 1 ? 1 : call.stages > kMaxStages ? kMaxStages : call.stages;
    plan.stage_bytes = 0;
    const int64_t room =
        (shared_limit() - dispatch_shared(plan, call.world.num_ranks, call.num_warps)) /
        call.num_warps;
    // A row is rather cut than loaded with nothing else in flight, but not below 2 KiB.
    const int64_t row = epcomm_align(call.row_in_bytes, unit);
    while (plan.stages > 1 && room / plan.stages < row && room / plan.stages < 2048) --plan.stages;
    int64_t largest = room / plan.stages / unit * unit;
    if (largest < unit) largest = 0;
    if (largest == 0) return plan;
    const int64_t cuts = (row + largest - 1) / largest;
    const int64_t piece = epcomm_align((row + cuts - 1) / cuts, unit);
    plan.pieces.in_bytes = int(piece);
    plan.pieces.out_bytes = int(piece / element);
    plan.pieces.count = int((call.row_in_bytes + piece - 1) / piece);
    plan.stage_bytes = int(epcomm_align(piece, 128));
    if (plan.stage_bytes > largest) plan.stage_bytes = int(piece);
    return plan;
}

template <int packing>
int launch_packing(const epcomm_cuda_dispatch& call, cudaStream_t stream) {
    const DispatchPlan plan = plan_dispatch(call, packing);
    const int64_t bytes = dispatch_shared(plan, call.world.num_ranks, call.num_warps);
    if (plan.stage_bytes == 0 || bytes > shared_limit()) return cudaErrorInvalidValue;
    dispatch_kernel<packing>
        <<<call.num_blocks, 32 * call.num_warps, size_t(bytes), stream>>>(call, plan);
    return cudaGetLastError();
}

int launch_dispatch(const epcomm_cuda_dispatch& call, cudaStream_t stream) {
    if (call.num_blocks < 1 || call.num_warps < 1 || call.num_warps > 16 ||
        call.routes.max_dests > EPCOMM_CUDA_MAX_DESTS || call.row_in_bytes % 16 != 0) {
        return cudaErrorInvalidValue;
    }
    const bool packs = call.announcement.format != call.input_format;
    if (!packs) return launch_packing<0>(call, stream);
    if (call.input_format == EPCOMM_FORMAT_BF16) return launch_packing<1>(call, stream);
    if (call.input_format == EPCOMM_FORMAT_F32) return launch_packing<2>(call, stream);
    return cudaErrorInvalidValue;
}

int load_dispatch() {
    int error = load(dispatch_kernel<0>);
    if (error == 0) error = load(dispatch_kernel<1>);
    if (error == 0) error = load(dispatch_kernel<2>);
    return error;
}

}  // namespace epcomm
