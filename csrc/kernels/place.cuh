// Layout, second pass: the row of every copy of every token, by prefix sums.
#pragma once

#include "count.cuh"

namespace epcomm {

/// Layout "rank". `next[R]` (this warp's) holds the row of the share's first copy at every rank.
/// The first pass, whose lanes had the same tokens, left their masks.
template <class Call>
__device__ inline void place_by_rank(const Call& call, const Share& share, const int* next) {
    const int R = call.world.num_ranks, D = call.routes.max_dests, lane = lane_id();
    int low = lane < R ? next[lane] : 0;
    int high = lane + 32 < R ? next[lane + 32] : 0;
    const auto load_mask = [&](int token) { return token < share.end ? *mask_of(call, token) : 0; };
    for_tokens(share, load_mask, [&](int token, uint64_t mask) {
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
    });
}

/// Layout "expert": where choice `k` stands in its token's list: after all copies of lower ranks,
/// and those of the same rank by an earlier choice. Dropped choices fill the end.
template <class Call>
__device__ inline int place_in_list(const Call& call, int token, int k, int expert,
                                    const RankOfExpert& rank_of) {
    const int K = call.world.num_topk, E = call.world.num_experts;
    const int rank = expert < 0 ? 0 : rank_of(expert);
    int position = 0;
    for (int first = 0; first < K; first += kLoadsTogether) {
        const Ids ids = load_ids(call, token, first, true);
#pragma unroll
        for (int i = 0; i < kLoadsTogether; ++i) {
            const bool valid = ids.id[i] >= 0 && ids.id[i] < E;
            const int other = valid ? rank_of(int(ids.id[i])) : 0;
            if (expert < 0) {
                position += valid || (first + i < k);
            } else {
                position += valid && (other < rank || (other == rank && first + i < k));
            }
        }
    }
    return position;
}

/// Layout "expert". `next[E]` (this warp's, shared memory) holds the row of the share's first copy
/// at every expert. A step takes 32 choices in (token, choice) order, one a lane.
template <class Call>
__device__ inline void place_by_expert(const Call& call, const Share& share, int* next) {
    const int K = call.world.num_topk, D = call.routes.max_dests, lane = lane_id();
    const int E = call.world.num_experts;
    const RankOfExpert rank_of(call.world);
    const int64_t begin = int64_t(share.begin) * K, end = int64_t(share.end) * K;
    int64_t coming = begin + lane < end ? call.routes.topk_idx[begin + lane] : -1;
    for (int64_t step = begin; step < end; step += 32) {
        const int64_t choice = step + lane, id = coming;
        coming = choice + 32 < end ? call.routes.topk_idx[choice + 32] : -1;
        const bool goes = id >= 0 && id < E;
        const int expert = goes ? int(id) : -1;
        const unsigned same = __match_any_sync(kWarp, expert);
        const int before = __popc(same & ((1u << lane) - 1));
        int row = 0;
        if (goes) row = next[expert] + before;
        __syncwarp();
        if (goes && before == 0) next[expert] += __popc(same);
        __syncwarp();
        if (choice >= end) continue;
        const int token = int(choice / K), k = int(choice % K);
        epcomm_cuda_dest* list = call.routes.dests + int64_t(token) * D;
        const int position = place_in_list(call, token, k, expert, rank_of);
        if (goes) {
            list[position] = {int16_t(rank_of(expert)), int16_t(k), row};
        } else {
            list[position] = {int16_t(-1), int16_t(-1), -1};
        }
    }
}

}  // namespace epcomm
