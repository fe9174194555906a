// Role: zero the rows of this rank's own output that no copy fills: the padding after each local
// expert's rows, and the unused end of a fixed-size output. Their source is -1.
#pragma once

#include "targets.cuh"

namespace epcomm {

/// Zero row `row` of `mine`; the whole warp.
__device__ __forceinline__ void clear_row(const epcomm_cuda_dispatch& call, const Target& mine,
                                          int64_t row) {
    const int lane = lane_id(), K = call.world.num_topk;
    const bool by_rank = call.row.layout == EPCOMM_LAYOUT_RANK;
    auto* words = reinterpret_cast<uint4*>(mine.rows + row * call.row.row_bytes);
    for (int i = lane; i < call.row.row_bytes / 16; i += 32) words[i] = make_uint4(0, 0, 0, 0);
    auto* scales = reinterpret_cast<uint32_t*>(mine.scales + row * call.row.scale_bytes);
    for (int i = lane; i < call.row.scale_bytes / 4; i += 32) scales[i] = 0;
    const int width = by_rank ? K : 1;
    for (int k = lane; k < width; k += 32) {
        if (by_rank && call.row.with_topk) mine.topk_idx[row * K + k] = -1;
        if (call.row.with_weights) mine.topk_weights[row * width + k] = 0.0f;
    }
    if (call.row.with_topk && lane == 0) mine.source[row] = make_int2(-1, -1);
}

/// All warps of all blocks share the rows; `groups` = local experts in layout expert, else 0.
__device__ inline void clear_unused(const epcomm_cuda_dispatch& call, const Target& mine) {
    const int warps = int(gridDim.x * (blockDim.x >> 5));
    const int warp = int(blockIdx.x * (blockDim.x >> 5)) + warp_id();
    if (call.row.layout == EPCOMM_LAYOUT_EXPERT) {
        const int groups = call.world.num_experts / call.world.num_ranks;
        for (int g = warp; g < groups; g += warps) {
            const int end = call.routes.group_start[g + 1];
            for (int row = call.routes.group_start[g] + call.routes.group_count[g]; row < end;
                 ++row) {
                clear_row(call, mine, row);
            }
        }
    }
    const int used = call.routes.rows[call.world.rank];
    for (int row = used + warp; row < call.announcement.fixed_rows; row += warps) {
        clear_row(call, mine, row);
    }
}

}  // namespace epcomm
