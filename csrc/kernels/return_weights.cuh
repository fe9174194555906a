// Role: bring every choice's weight back to its token (the backward pass of dispatch).
#pragma once

#include "reduce.cuh"

namespace epcomm {

/// topk_weights[t, k] = the weight that the row of choice k carries; 0 for a dropped choice.
/// Layout rank: rows carry K weights, and choice k's is the k-th at the expert's rank. Layout
/// expert: a row is one choice and carries one.
__device__ inline void return_weights(const epcomm_cuda_combine& call, const Offer* offers) {
    const int K = call.world.num_topk, lane = lane_id();
    const int E = call.world.num_experts, per_rank = E / call.world.num_ranks;
    const int warps = int(gridDim.x * (blockDim.x >> 5));
    const int first = int(blockIdx.x * (blockDim.x >> 5)) + warp_id();
    for (int token = first; token < call.routes.num_tokens; token += warps) {
        const Copies copies = copies_of(call.routes.dests, call.routes.max_dests, token);
        for (int chunk = 0; chunk < K; chunk += 32) {
            const int k = chunk + lane;
            const int64_t id = k < K ? call.routes.topk_idx[int64_t(token) * K + k] : -1;
            const int expert_rank = id >= 0 && id < E ? int(id) / per_rank : -1;
            float weight = 0.0f;
            for (int i = 0; i < copies.count; ++i) {
                const int rank = __shfl_sync(kWarp, copies.rank, i);
                const int choice = __shfl_sync(kWarp, copies.choice, i);
                const int64_t row = __shfl_sync(kWarp, copies.row, i);
                if (call.layout == EPCOMM_LAYOUT_EXPERT) {
                    if (choice == k) weight = offers[rank].topk_weights[row];
                } else if (rank == expert_rank) {
                    weight = offers[rank].topk_weights[row * K + k];
                }
            }
            if (k < K) call.topk_weights[int64_t(token) * K + k] = weight;
        }
    }
}

}  // namespace epcomm
