// Layout, first pass: how many tokens each warp's share sends to every rank and expert.
//
// A warp owns a contiguous share of the tokens, 32 at a time, one a lane. Counts are sums of
// integers, so the shared-memory adds below give the same result in any order; places (place.cuh)
// come from prefix sums only.
#pragma once

#include "wait.cuh"

namespace epcomm {

/// Tokens [begin, end) of this warp.
struct Share {
    int begin;
    int end;
};

__device__ inline Share warp_share(int num_tokens) {
    const int warps = int(gridDim.x * (blockDim.x >> 5));
    const int warp = int(blockIdx.x * (blockDim.x >> 5)) + warp_id();
    const int groups = (num_tokens + 31) / 32;
    // Groups of 32 are dealt as evenly as possible, in order.
    const int each = groups / warps, rest = groups % warps;
    const int first = warp * each + min(warp, rest);
    const int count = each + (warp < rest ? 1 : 0);
    return {min(first * 32, num_tokens), min((first + count) * 32, num_tokens)};
}

/// Bit r: the lane's token has an expert on rank r. With `bad_choice`, the place of an id out of
/// range or chosen before by the same token is left there.
__device__ inline uint64_t rank_mask(const epcomm_cuda_layout& call, int token, int* expert_bins,
                                     int32_t* bad_choice) {
    const int K = call.world.num_topk;
    const int per_rank = call.world.num_experts / call.world.num_ranks;
    const int64_t* ids = call.routes.topk_idx + int64_t(token) * K;
    uint64_t mask = 0;
    for (int k = 0; k < K; ++k) {
        const int64_t id = ids[k];
        if (id == -1) continue;
        if (id < 0 || id >= call.world.num_experts) {
            if (bad_choice != nullptr) atomicMin(bad_choice, token * K + k);
            continue;
        }
        if (bad_choice != nullptr) {
            for (int j = 0; j < k; ++j) {
                if (ids[j] == id) atomicMin(bad_choice, token * K + k);
            }
        }
        mask |= 1ull << (int(id) / per_rank);
        if (expert_bins != nullptr) atomicAdd(&expert_bins[id], 1);
    }
    return mask;
}

/// Count this warp's share: `rank_bins[R]` is the warp's own, `expert_bins[E]` may be shared.
__device__ inline void count_share(const epcomm_cuda_layout& call, int* rank_bins,
                                   int* expert_bins) {
    const int R = call.world.num_ranks, lane = lane_id();
    const Share share = warp_share(call.routes.num_tokens);
    int low = 0, high = 0;  // counts of rank `lane` and of rank 32 + `lane`
    for (int t = share.begin; t < share.end; t += 32) {
        const uint64_t mask = t + lane < share.end ? rank_mask(call, t + lane, expert_bins,
                                                               &own_control(call.world)->bad_choice)
                                                   : 0;
        for (int r = 0; r < R; ++r) {
            const int tokens = __popc(__ballot_sync(kWarp, (mask >> r) & 1));
            if (r == lane) low += tokens;
            if (r == lane + 32) high += tokens;
        }
    }
    if (lane < R) rank_bins[lane] = low;
    if (lane + 32 < R) rank_bins[lane + 32] = high;
}

}  // namespace epcomm
