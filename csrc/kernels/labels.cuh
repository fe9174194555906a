// A row's copies in this node, whatever hop brings it: which local ranks, and what is stored there
// beside the payload.
#pragma once

#include "epcomm_cuda_rail.h"
#include "targets.cuh"

namespace epcomm {

/// A list of copies, entry i in lane i, in order of (local rank, choice).
struct CopyList {
    int count;
    int local;  ///< -1: the lane has no entry
    int choice;
    int row;
    unsigned rows;  ///< lanes that stand for a row: in layout rank, the first of each rank
};

/// Which entries stand for a row. The whole warp.
__device__ __forceinline__ unsigned rows_of_list(int local, int layout) {
    const int before = __shfl_up_sync(kWarp, local, 1);
    const bool first = lane_id() == 0 || before != local;
    return __ballot_sync(kWarp, local >= 0 && (layout == EPCOMM_LAYOUT_EXPERT || first));
}

/// An entry of such a list; local -1: none.
struct Copy {
    int local;
    int choice;
    int row;
};

__device__ __forceinline__ Copy copy_of(const epcomm_cuda_dest& dest) {
    return {dest.rank, dest.choice, dest.row};
}

/// The list of which each lane has an entry. The whole warp.
__device__ __forceinline__ CopyList list_of_copies(const Copy& mine, int layout) {
    CopyList copies;
    copies.local = mine.local;
    copies.choice = mine.choice;
    copies.row = mine.row;
    copies.count = __popc(__ballot_sync(kWarp, mine.local >= 0));
    copies.rows = rows_of_list(mine.local, layout);
    return copies;
}

/// What comes with a token: lane k < K holds choice k.
struct Labels {
    int expert;  ///< global id, or -1
    float weight;
    int source_rank;
    int source_token;
};

/// Role: store top-k ids (local to the rank, or -1), weights and source at every row of the list. A
/// row gets the weights of its own rank's choices; the others are 0. The whole warp.
__device__ __forceinline__ void store_row_labels(const epcomm_cuda_dispatch& call,
                                                 const Target* targets, const CopyList& copies,
                                                 const Labels& labels) {
    const epcomm_cuda_row& row = call.row;
    const int K = call.world.num_topk, lane = lane_id();
    const int per_rank = call.world.num_experts / call.world.num_ranks;
    const bool stands = copies.rows >> lane & 1;
    if (row.with_topk && stands) {
        targets[copies.local].source[copies.row] =
            make_int2(labels.source_rank, labels.source_token);
    }
    if (row.layout == EPCOMM_LAYOUT_EXPERT) {
        const float weight = __shfl_sync(kWarp, labels.weight, copies.choice & 31);
        if (row.with_weights && stands) targets[copies.local].topk_weights[copies.row] = weight;
        return;
    }
    for (unsigned left = copies.rows; left != 0; left &= left - 1) {
        const int from = __ffs(int(left)) - 1;
        const int local = __shfl_sync(kWarp, copies.local, from);
        const int64_t at = __shfl_sync(kWarp, copies.row, from) * int64_t(K) + lane;
        const int id = labels.expert - call.world.node_ranks[local] * per_rank;
        const bool here = labels.expert >= 0 && id >= 0 && id < per_rank;
        if (lane >= K) continue;
        if (row.with_topk) targets[local].topk_idx[at] = here ? id : -1;
        if (row.with_weights) targets[local].topk_weights[at] = here ? labels.weight : 0.0f;
    }
}

}  // namespace epcomm
