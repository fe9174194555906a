// Rows that a warp has at hand together: one choice of one row a lane.
#pragma once

#include "labels.cuh"

namespace epcomm {

/// A lane's place: choice `k` of row `row` of those at hand.
struct Seat {
    int row;
    int k;
    bool taken;  ///< there is such a row

    /// So many rows have room in a warp.
    __device__ __forceinline__ Seat(int num_topk, int rows)
        : row(lane_id() / num_topk), k(lane_id() % num_topk), taken(row < rows) {}
};

/// Row `row`'s of what the lanes have of all rows: lane k gets choice k's, others `none`.
template <typename T>
__device__ __forceinline__ T of_row(T mine, int row, int num_topk, T none) {
    const T found = __shfl_sync(kWarp, mine, (row * num_topk + lane_id()) & 31);
    return lane_id() < num_topk ? found : none;
}

__device__ __forceinline__ CopyList list_of_row(const Copy& all, int row, int num_topk,
                                                int layout) {
    return list_of_copies(
        {of_row(all.local, row, num_topk, -1), of_row(all.choice, row, num_topk, -1),
         of_row(all.row, row, num_topk, -1)},
        layout);
}

}  // namespace epcomm
