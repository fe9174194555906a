// Layout, first pass: how many tokens each warp's share sends to every rank and expert.
//
// A warp owns a contiguous share of the tokens, 32 at a time, one a lane. Counts are sums of
// integers, so the shared-memory adds below give the same result in any order; places (place.cuh)
// come from prefix sums only. Little is computed and much is waited for: loads that do not depend
// on each other are all issued before the first is used.
#pragma once

#include "wait.cuh"

namespace epcomm {

constexpr int kLoadsTogether = 8;

/// Tokens [begin, end) of this warp.
struct Share {
    int begin;
    int end;
};

/// The first `each` warps of every block share the tokens, in order; for one of these. `step`: how
/// many tokens a warp takes at a time.
__device__ inline Share warp_share(int num_tokens, int each, int step = 32) {
    const int warps = int(gridDim.x) * each;
    const int warp = int(blockIdx.x) * each + warp_id();
    const int steps = (num_tokens + step - 1) / step;
    // Steps are dealt as evenly as possible, in order.
    const int few = steps / warps, rest = steps % warps;
    const int first = warp * few + min(warp, rest);
    const int count = few + (warp < rest ? 1 : 0);
    return {min(first * step, num_tokens), min((first + count) * step, num_tokens)};
}

/// Call `visit(i, value)` for `count` values, `stride` apart, in order.
template <class Visit>
__device__ __forceinline__ void for_column(const int32_t* column, int stride, int count,
                                           Visit&& visit) {
    for (int first = 0; first < count; first += kLoadsTogether) {
        int value[kLoadsTogether];
#pragma unroll
        for (int i = 0; i < kLoadsTogether; ++i) {
            value[i] = first + i < count ? column[(first + i) * stride] : 0;
        }
#pragma unroll
        for (int i = 0; i < kLoadsTogether; ++i) {
            if (first + i < count) visit(first + i, value[i]);
        }
    }
}

/// The sum of `count` values, `stride` apart.
__device__ inline int column_sum(const int32_t* column, int stride, int count) {
    int sum = 0;
    for_column(column, stride, count, [&](int, int value) { sum += value; });
    return sum;
}

/// Turn `count` counts, `stride` apart, into the first number of each, in place: `next` for the
/// first one, and each further one's behind those before.
__device__ inline void scan_column(int* column, int stride, int count, int next) {
    for_column(column, stride, count, [&](int i, int value) {
        column[i * stride] = next;
        next += value;
    });
}

/// Some of a token's choices.
struct Ids {
    int64_t id[kLoadsTogether];  ///< -1 beyond the last
};

/// Choices `first` and following of `token`; none for a token that is not `inside`.
template <class Call>
__device__ __forceinline__ Ids load_ids(const Call& call, int token, int first, bool inside) {
    const int K = call.world.num_topk;
    const int64_t* from = call.routes.topk_idx + int64_t(token) * K;
    Ids ids;
#pragma unroll
    for (int i = 0; i < kLoadsTogether; ++i) {
        ids.id[i] = inside && first + i < K ? from[first + i] : -1;
    }
    return ids;
}

/// The rank that holds an expert: a division by a number that is known when the call is made, in
/// two instructions instead of the compiler's twenty.
struct RankOfExpert {
    unsigned reciprocal;  ///< of a rank's experts, times 2^31, rounded up

    __device__ explicit RankOfExpert(const epcomm_cuda_world& world) {
        const unsigned each = unsigned(world.num_experts / world.num_ranks);
        reciprocal = ((1u << 31) + each - 1) / each;
    }

    /// Exact: rounding adds less than `expert` times `each` to the product, out of 2^31.
    __device__ __forceinline__ int operator()(int expert) const {
        return int(__umulhi(2u * unsigned(expert), reciprocal));
    }
};
static_assert(int64_t(EPCOMM_CUDA_MAX_EXPERTS) * EPCOMM_CUDA_MAX_EXPERTS < int64_t(1) << 31,
              "ranks of experts are found by multiplication");

/// Bit r: the token has an expert on rank r. `ids` are its first choices. Counts its experts, and
/// leaves the place of an id out of range or chosen before by the same token in `bad_choice`.
template <class Call>
__device__ inline uint64_t rank_mask(const Call& call, int token, Ids ids, bool inside,
                                     const RankOfExpert& rank_of, int* expert_bins,
                                     int32_t* bad_choice) {
    const int K = call.world.num_topk, E = call.world.num_experts;
    uint64_t mask = 0;
    for (int first = 0; first < K; first += kLoadsTogether) {
        if (first > 0) ids = load_ids(call, token, first, inside);
#pragma unroll
        for (int i = 0; i < kLoadsTogether; ++i) {
            const int64_t id = ids.id[i];
            if (id == -1) continue;
            bool bad = id < 0 || id >= E;
            if (!bad) {
                mask |= 1ull << rank_of(int(id));
                atomicAdd(&expert_bins[id], 1);
            }
#pragma unroll
            for (int j = 0; j < i; ++j) bad = bad || ids.id[j] == id;
            for (int j = 0; j < first; ++j) {
                bad = bad || call.routes.topk_idx[int64_t(token) * K + j] == id;
            }
            if (bad) atomicMin(bad_choice, token * K + first + i);
        }
    }
    return mask;
}

/// Where the first pass leaves a token's mask for the second (layout "rank"): the place of its
/// first copy, whose list the second pass writes over it.
template <class Call>
__device__ __forceinline__ uint64_t* mask_of(const Call& call, int token) {
    return reinterpret_cast<uint64_t*>(call.routes.dests + int64_t(token) * call.routes.max_dests);
}

/// Call `visit(token, loaded)` for a share's tokens, one a lane, with what `load(token)` gave. The
/// lanes of the last step may be beyond the share.
template <class Load, class Visit>
__device__ __forceinline__ void for_tokens(const Share& share, Load&& load, Visit&& visit) {
    const int lane = lane_id();
    auto coming = load(share.begin + lane);
    for (int t = share.begin; t < share.end; t += 32) {
        const int token = t + lane;
        const auto loaded = coming;
        coming = load(token + 32);
        visit(token, loaded);
    }
}

/// Count this warp's share: `rank_bins[R]` is the warp's own, `expert_bins[E]` may be shared.
template <class Call>
__device__ inline void count_share(const Call& call, const Share& share, int* rank_bins,
                                   int* expert_bins) {
    const int R = call.world.num_ranks, lane = lane_id();
    const bool keep = call.row.layout == EPCOMM_LAYOUT_RANK;
    const RankOfExpert rank_of(call.world);
    int32_t* bad_choice = &own_control(call.world)->bad_choice;
    int low = 0, high = 0;  // counts of rank `lane` and of rank 32 + `lane`
    const auto load = [&](int token) { return load_ids(call, token, 0, token < share.end); };
    for_tokens(share, load, [&](int token, const Ids& ids) {
        const bool inside = token < share.end;
        const uint64_t mask = rank_mask(call, token, ids, inside, rank_of, expert_bins, bad_choice);
        if (keep && inside) *mask_of(call, token) = mask;
        for (int r = 0; r < R; ++r) {
            const int tokens = __popc(__ballot_sync(kWarp, (mask >> r) & 1));
            if (r == lane) low += tokens;
            if (r == lane + 32) high += tokens;
        }
    });
    if (lane < R) rank_bins[lane] = low;
    if (lane + 32 < R) rank_bins[lane + 32] = high;
}

}  // namespace epcomm
