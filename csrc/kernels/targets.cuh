// Where the parts of every rank's output lie, and what a row carries besides its payload.
#pragma once

#include "announce.cuh"

namespace epcomm {

/// Addresses in one rank's window.
struct Target {
    uint8_t* rows;
    uint8_t* scales;
    int64_t* topk_idx;
    float* topk_weights;
    int2* source;
};

/// Fill `targets[L]` from the announcements of this epoch. The whole block.
__device__ inline void find_targets(const epcomm_cuda_dispatch& call, uint64_t epoch,
                                    Target* targets) {
    const epcomm_cuda_world& world = call.world;
    for (int l = int(threadIdx.x); l < world.num_local; l += int(blockDim.x)) {
        const int r = world.node_ranks[l];
        const epcomm_announcement* theirs = announcement_from(world, r, epoch);
        uint8_t* window = world.windows[int64_t(l) * world.num_windows + theirs->window_serial];
        const int64_t held =
            call.announcement.fixed_rows >= 0 ? call.announcement.fixed_rows : call.routes.rows[r];
        const epcomm_cuda_parts parts = window_parts(call.row, held);
        targets[l].rows = window + parts.rows;
        targets[l].scales = window + parts.scales;
        targets[l].topk_idx = reinterpret_cast<int64_t*>(window + parts.topk_idx);
        targets[l].topk_weights = reinterpret_cast<float*>(window + parts.topk_weights);
        targets[l].source = reinterpret_cast<int2*>(window + parts.source);
    }
}

/// The copies of one token: lane i < count holds copy i.
struct Copies {
    int count;
    int rank;
    int choice;
    int row;
};

__device__ __forceinline__ Copies copies_of(const epcomm_cuda_dest* dests, int max_dests,
                                            int token) {
    const int lane = lane_id();
    epcomm_cuda_dest mine = {-1, -1, -1};
    if (lane < max_dests) mine = dests[int64_t(token) * max_dests + lane];
    Copies copies;
    copies.count = __popc(__ballot_sync(kWarp, mine.rank >= 0));
    copies.rank = mine.rank;
    copies.choice = mine.choice;
    copies.row = mine.row;
    return copies;
}

/// Role: store the top-k ids (local to the rank, or -1), weights and source of every copy of
/// `token`. A copy's row gets the weights of its own choices; the others are 0.
__device__ __forceinline__ void store_labels(const epcomm_cuda_dispatch& call,
                                             const Target* targets, const Copies& copies,
                                             int token) {
    const int K = call.world.num_topk, lane = lane_id();
    const int per_rank = call.world.num_experts / call.world.num_ranks;
    if (call.row.with_topk && lane < copies.count) {
        targets[copies.rank].source[copies.row] = make_int2(call.world.rank, token);
    }
    if (call.row.layout == EPCOMM_LAYOUT_EXPERT) {
        if (call.row.with_weights && lane < copies.count) {
            targets[copies.rank].topk_weights[copies.row] =
                call.topk_weights[int64_t(token) * K + copies.choice];
        }
        return;
    }
    if (!call.row.with_topk && !call.row.with_weights) return;
    for (int chunk = 0; chunk < K; chunk += 32) {
        const int k = chunk + lane;
        const int64_t at = int64_t(token) * K + k;
        const int64_t id = k < K ? call.routes.topk_idx[at] : -1;
        const float weight = k < K && call.row.with_weights ? call.topk_weights[at] : 0.0f;
        for (int i = 0; i < copies.count; ++i) {
            const int rank = __shfl_sync(kWarp, copies.rank, i);
            const int64_t row = __shfl_sync(kWarp, copies.row, i);
            const int64_t local = id - int64_t(rank) * per_rank;
            const bool here = id >= 0 && local >= 0 && local < per_rank;
            if (k >= K) continue;
            if (call.row.with_topk) targets[rank].topk_idx[row * K + k] = here ? local : -1;
            if (call.row.with_weights) targets[rank].topk_weights[row * K + k] = here ? weight : 0;
        }
    }
}

/// Role: store a row's scales at every copy.
__device__ __forceinline__ void store_scale_words(const epcomm_cuda_dispatch& call,
                                                  const Target* targets, const Copies& copies,
                                                  const uint32_t* words) {
    const int count = call.row.scale_bytes / 4;
    for (int first = 0; first < count; first += 32) {
        const int w = first + lane_id();
        const uint32_t word = w < count ? words[w] : 0;
        for (int i = 0; i < copies.count; ++i) {
            const int rank = __shfl_sync(kWarp, copies.rank, i);
            const int64_t row = __shfl_sync(kWarp, copies.row, i);
            uint8_t* to = targets[rank].scales + row * call.row.scale_bytes;
            if (w < count) reinterpret_cast<uint32_t*>(to)[w] = word;
        }
    }
}

}  // namespace epcomm
