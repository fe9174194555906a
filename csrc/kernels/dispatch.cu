// Dispatch on the host: how a call is cut for shared memory, and launched.
#include "dispatch.cuh"
#include "launch.cuh"

namespace epcomm {

/// Cut rows so that every warp has a piece in shared memory, in as many stages as fit.
/// `stage_bytes` 0: they do not fit.
DispatchPlan plan_dispatch(const epcomm_cuda_dispatch& call, int packing) {
    // Rows to be packed come through registers, in rounds: only their codes are held.
    const int held_bytes = packing == 0 ? call.row_in_bytes : call.row.row_bytes;
    const int unit = packing == 0 ? EPCOMM_LIMIT_record_align : kRoundElements<false>;
    DispatchPlan plan;
    plan.scale_bytes = packing == 0 ? 0 : call.row.scale_bytes;
    plan.stages = call.stages < 1 ? 1 : call.stages > kMaxStages ? kMaxStages : call.stages;
    plan.stage_bytes = 0;
    plan.layout_warps = 0;
    const int64_t room =
        (shared_limit() - stages_offset(plan, call.world.num_ranks, call.num_warps)) /
        call.num_warps;
    // A row is rather cut than loaded with nothing else in flight, but not below 2 KiB.
    const int64_t row = epcomm_align(held_bytes, unit);
    while (plan.stages > 1 && room / plan.stages < row && room / plan.stages < 2048) --plan.stages;
    int64_t largest = room / plan.stages / unit * unit;
    if (largest < unit) largest = 0;
    if (largest == 0) return plan;
    const int64_t cuts = (row + largest - 1) / largest;
    const int64_t piece = epcomm_align((row + cuts - 1) / cuts, unit);
    plan.pieces.bytes = int(piece);
    plan.pieces.count = int((held_bytes + piece - 1) / piece);
    plan.stage_bytes = int(epcomm_align(piece, 128));
    if (plan.stage_bytes > largest) plan.stage_bytes = int(piece);
    return plan;
}

/// Bytes of the stages, or of what a first call has in their place; 0: no warp's counts fit.
int64_t plan_layout(const epcomm_cuda_dispatch& call, int64_t room, DispatchPlan& plan) {
    const int R = call.world.num_ranks, E = call.world.num_experts;
    const int64_t stages = int64_t(call.num_warps) * plan.stages * plan.stage_bytes;
    if (call.announce) return stages;
    for (int warps = call.num_warps; warps > 0; warps /= 2) {
        const int64_t bytes = 4 * LayoutShared::ints(R, E, warps, call.row.layout);
        if (bytes > room) continue;
        plan.layout_warps = warps;
        return bytes > stages ? bytes : stages;
    }
    return 0;
}

template <int packing>
int launch_packing(const epcomm_cuda_dispatch& call, cudaStream_t stream) {
    DispatchPlan plan = plan_dispatch(call, packing);
    if (plan.stage_bytes == 0) return cudaErrorInvalidValue;
    const int64_t offset = stages_offset(plan, call.world.num_ranks, call.num_warps);
    const int64_t bytes = plan_layout(call, shared_limit() - offset, plan);
    if (bytes == 0) return cudaErrorInvalidValue;
    const auto kernel =
        call.announce ? dispatch_kernel<packing, false> : dispatch_kernel<packing, true>;
    return launch(kernel, {call.num_blocks, 32 * call.num_warps, offset + bytes}, stream, call,
                  plan);
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

template <int packing>
int load_packing() {
    const int error = load(dispatch_kernel<packing, true>);
    return error == 0 ? load(dispatch_kernel<packing, false>) : error;
}

int load_dispatch() {
    int error = load_packing<0>();
    if (error == 0) error = load_packing<1>();
    if (error == 0) error = load_packing<2>();
    return error;
}

}  // namespace epcomm
