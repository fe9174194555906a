// Layout, second pass: the row of every copy of every token, by prefix sums.
#pragma once

#include "count.cuh"

namespace epcomm {

/// Layout "rank". `next[R]` (this warp's) holds the row of the share's first copy at every rank.
__device__ inline void place_by_rank(const epcomm_cuda_layout& call, const int* next) {
    const int R = call.world.num_ranks, D = call.routes.max_dests, lane = lane_id();
    const Share share = warp_share(call.routes.num_tokens);
    int low = lane < R ? next[lane] : 0;
    int high = lane + 32 < R ? next[lane + 32] : 0;
    for (int t = share.begin; t < share.end; t += 32) {
        const int token = t + lane;
        const uint64_t mask = token < share.end ? rank_mask(call, token, nullptr, nullptr) : 0;
        epcomm_cuda_dest* list = call.routes.dests + int64_t(token) * D;
        int length = 0;
        for (int r = 0; r < R; ++r) {
            const bool goes = (mask >> r) & 1;
            const unsigned going = __ballot_sync(kWarp, goes);
            const int first = __shfl_sync(kWarp, r < 32 ? low : high, r & 31);
            if (goes) {
                const int row = first + __popc(going & ((1u << lane) - 1));
                list[length++] = {int16_t(r), int16_t(-1), row};
            }
            if (r == lane) low += __popc(going);
            if (r == lane + 32) high += __popc(going);
        }
        if (token < share.end) {
            for (; length < D; ++length) list[length] = {int16_t(-1), int16_t(-1), -1};
        }
    }
}

/// Layout "expert". `next[E]` (this warp's, shared memory) holds the row of the share's first copy
/// at every expert. A step takes 32 choices in (token, choice) order, one a lane.
__device__ inline void place_by_expert(const epcomm_cuda_layout& call, int* next) {
    const int K = call.world.num_topk, D = call.routes.max_dests, lane = lane_id();
    const int E = call.world.num_experts, per_rank = E / call.world.num_ranks;
    const Share share = warp_share(call.routes.num_tokens);
    const int64_t begin = int64_t(share.begin) * K, end = int64_t(share.end) * K;
    for (int64_t step = begin; step < end; step += 32) {
        const int64_t choice = step + lane;
        const bool inside = choice < end;
        const int64_t id = inside ? call.routes.topk_idx[choice] : -1;
        const bool goes = id >= 0 && id < E;
        const int expert = goes ? int(id) : -1;
        const unsigned same = __match_any_sync(kWarp, expert);
        const int before = __popc(same & ((1u << lane) - 1));
        int row = 0;
        if (goes) row = next[expert] + before;
        __syncwarp();
        if (goes && before == 0) next[expert] += __popc(same);
        __syncwarp();
        if (!inside) continue;
        const int64_t token = choice / K;
        const int k = int(choice % K);
        const int64_t* ids = call.routes.topk_idx + token * K;
        // The copy's place in the token's list: after all copies of lower ranks, and those of
        // the same rank by an earlier choice. Dropped choices fill the end.
        int position = 0, kept = 0;
        for (int j = 0; j < K; ++j) {
            const int64_t other = ids[j];
            const bool valid = other >= 0 && other < E;
            kept += valid;
            if (goes ? valid : !valid) {
                const int rank = goes ? int(other) / per_rank : 0;
                const int mine = goes ? expert / per_rank : 0;
                position += rank < mine || (rank == mine && j < k);
            }
        }
        epcomm_cuda_dest* list = call.routes.dests + token * D;
        if (goes) {
            list[position] = {int16_t(expert / per_rank), int16_t(k), row};
        } else {
            list[kept + position] = {int16_t(-1), int16_t(-1), -1};
        }
    }
}

}  // namespace epcomm
