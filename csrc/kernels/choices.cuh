// Layout among nodes: one choice a lane. A step takes as many whole tokens as fit into a warp, so
// that the choices of a token see each other by shuffles. The ids of the next step are asked for
// before this one's are looked at.
#pragma once

#include "count.cuh"
#include "epcomm_cuda_rail.h"

namespace epcomm {

/// A lane's choice; expert -1: none, or an id that cannot be routed.
struct Choice {
    int token;
    int k;
    bool inside;  ///< the lane has a token of the share
    int expert;
    int rank;
    int node;
    int rank_leader;  ///< the token's first choice of that rank
    bool leads_rank;  ///< it is this one
    bool leads_node;
};

/// Tokens of a step. K is at most a warp.
__device__ __forceinline__ int tokens_per_step(int num_topk) { return 32 / num_topk; }

/// This warp's tokens: more of fewer where there are many warps.
__device__ __forceinline__ Share step_share(const epcomm_cuda_layout& call) {
    return warp_share(call.routes.num_tokens, int(blockDim.x >> 5),
                      tokens_per_step(call.world.num_topk));
}

/// Whether the lane has a choice in the step that begins at token `first`.
__device__ __forceinline__ bool has_choice(int num_topk, int first, int end) {
    const int in_step = lane_id() / num_topk;
    return in_step < tokens_per_step(num_topk) && first + in_step < end;
}

/// The lane's id in that step; -1: it has none.
__device__ __forceinline__ int64_t load_id(const epcomm_cuda_layout& call, int first, int end) {
    const int K = call.world.num_topk;
    if (!has_choice(K, first, end)) return -1;
    return call.routes.topk_idx[int64_t(first) * K + lane_id()];
}

/// The lane that holds choice j of this lane's token.
__device__ __forceinline__ int lane_of_choice(int num_topk, int j) {
    return (lane_id() / num_topk * num_topk + j) & 31;
}

/// Call `visit(lane, bit)` for the choices of this lane's token: the lane of choice j, and bit j.
/// The whole warp, for shuffles, several of which are under way together; the bit is 0 where there
/// is no such choice.
template <class Visit>
__device__ __forceinline__ void for_siblings(int num_topk, Visit&& visit) {
    constexpr int kTogether = 8;
    for (int first = 0; first < num_topk; first += kTogether) {
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            const int j = first + i;
            visit(lane_of_choice(num_topk, j), j < num_topk ? 1u << j : 0u);
        }
    }
}

/// The lane's choice of `id`, in the step that begins at token `first`. The whole warp. With
/// `bad_choice`, the place of an id out of range or chosen before by the same token is left there.
__device__ __forceinline__ Choice choice_of(const epcomm_cuda_two_hop_layout& all,
                                            const RankOfExpert& rank_of, int64_t id, int first,
                                            int end, int32_t* bad_choice) {
    const epcomm_cuda_layout& call = all.call;
    const int K = call.world.num_topk, E = call.world.num_experts;
    const bool valid = id >= 0 && id < E;
    Choice c;
    c.token = first + lane_id() / K;
    c.k = lane_id() % K;
    c.inside = has_choice(K, first, end);
    c.expert = valid ? int(id) : -1;
    c.rank = valid ? rank_of(c.expert) : -1;
    c.node = valid ? all.rail.places[c.rank].node : -1;
    unsigned same_expert = 0, same_rank = 0, same_node = 0;  // by choice
    const int place = c.node << 16 | (c.rank & 0xffff);      // one shuffle for both
    for_siblings(K, [&](int lane, unsigned bit) {
        const int other = __shfl_sync(kWarp, place, lane);
        if (other == place) same_rank |= bit;
        if (other >> 16 == c.node) same_node |= bit;
        if (bad_choice != nullptr && __shfl_sync(kWarp, c.expert, lane) == c.expert) {
            same_expert |= bit;
        }
    });
    const unsigned earlier = (1u << c.k) - 1;
    const bool bad = valid ? (same_expert & earlier) != 0 : id != -1;
    if (bad_choice != nullptr && bad) atomicMin(bad_choice, c.token * K + c.k);
    c.rank_leader = __ffs(int(same_rank)) - 1;
    c.leads_rank = valid && (same_rank & earlier) == 0;
    c.leads_node = valid && (same_node & earlier) == 0;
    return c;
}

/// Call `visit(choice)` for this warp's choices, one a lane. The whole warp.
template <class Visit>
__device__ __forceinline__ void for_choices(const epcomm_cuda_two_hop_layout& all,
                                            int32_t* bad_choice, Visit&& visit) {
    const epcomm_cuda_layout& call = all.call;
    const Share share = step_share(call);
    const int step = tokens_per_step(call.world.num_topk);
    const RankOfExpert rank_of(call.world);
    int64_t coming = load_id(call, share.begin, share.end);
    for (int t = share.begin; t < share.end; t += step) {
        const int64_t id = coming;
        coming = load_id(call, t + step, share.end);
        visit(choice_of(all, rank_of, id, t, share.end, bad_choice));
    }
}

/// What rows are counted by: a choice's expert, or the first choice of a rank; -1: not counted.
__device__ __forceinline__ int key_of(const Choice& c, bool by_expert) {
    return by_expert ? c.expert : c.leads_rank ? c.rank : -1;
}

/// Add up this warp's share. `warp_bins`: [N] records, then [R] or [E] rows, by layout;
/// `other_bins`: [E] or [R], the counts that only the announcement needs, shared by the block.
__device__ inline void count_choices(const epcomm_cuda_two_hop_layout& all, int* warp_bins,
                                     int* other_bins) {
    const epcomm_cuda_layout& call = all.call;
    const bool by_expert = call.row.layout == EPCOMM_LAYOUT_EXPERT;
    int* keys = warp_bins + call.world.num_nodes;
    for_choices(all, &own_control(call.world)->bad_choice, [&](const Choice& c) {
        if (c.leads_node) atomicAdd(&warp_bins[c.node], 1);
        const int key = key_of(c, by_expert), other = key_of(c, !by_expert);
        if (key >= 0) atomicAdd(&keys[key], 1);
        if (other >= 0) atomicAdd(&other_bins[other], 1);
    });
}

/// A number for every lane with a key >= 0: how many came before with the same key, in order of
/// lanes, on top of next[key], which is raised. The whole warp.
__device__ __forceinline__ int number(int* next, int key) {
    const unsigned same = __match_any_sync(kWarp, key);
    const int before = __popc(same & ((1u << lane_id()) - 1));
    const int found = key >= 0 ? next[key] + before : -1;
    __syncwarp();
    if (key >= 0 && before == 0) next[key] += __popc(same);
    __syncwarp();
    return found;
}

/// Write the lists of this step's tokens: near copies and records, each closed by -1. The whole
/// warp. `index`: of the choice's row, `slot`: of the record that the choice leads. A near copy's
/// row is its index yet.
__device__ __forceinline__ void write_lists(const epcomm_cuda_two_hop_layout& all, const Choice& c,
                                            int index, int slot) {
    const epcomm_cuda_layout& call = all.call;
    const epcomm_cuda_rail& rail = all.rail;
    const int K = call.world.num_topk, F = all.hops.max_far, own = rail.chunking.node;
    const bool near = c.node == own, sends = c.leads_node && !near;
    // One number orders both lists: near copies by (rank, choice), behind them records by node.
    const int order = near    ? c.rank * 32 + c.k
                      : sends ? (call.world.num_ranks + c.node) * 32
                              : INT32_MAX;
    int at = 0;
    for_siblings(K, [&](int lane, unsigned bit) {
        at += __shfl_sync(kWarp, order, lane) < order && bit != 0;
    });
    const unsigned all_near = __ballot_sync(kWarp, near), all_far = __ballot_sync(kWarp, sends);
    if (!c.inside) return;
    const unsigned token = (K < 32 ? (1u << K) - 1 : kWarp) << lane_of_choice(K, 0);
    const int num_near = __popc(all_near & token), num_far = __popc(all_far & token);
    epcomm_cuda_dest* dests = call.routes.dests + int64_t(c.token) * K;
    epcomm_cuda_far* far = all.hops.far + int64_t(c.token) * F;
    if (c.k >= num_near) dests[c.k] = {int16_t(-1), int16_t(-1), -1};
    if (c.k >= num_far && c.k < F) far[c.k] = {-1, -1};
    if (near) dests[at] = {rail.places[c.rank].local, int16_t(c.k), index};
    if (sends) {
        far[at - num_near] = {c.node, slot};
        all.hops
            .token_of[int64_t(epcomm_peer_index(own, c.node)) * rail.chunking.max_records + slot] =
            c.token;
    }
}

/// Second pass: number every row and record, among this rank's own. `next`: this warp's first
/// numbers, laid out as `warp_bins`.
__device__ inline void number_choices(const epcomm_cuda_two_hop_layout& all, int* next) {
    const epcomm_cuda_layout& call = all.call;
    const int K = call.world.num_topk;
    const bool by_expert = call.row.layout == EPCOMM_LAYOUT_EXPERT;
    for_choices(all, nullptr, [&](const Choice& c) {
        const int slot = number(next, c.leads_node ? c.node : -1);
        int index = number(next + call.world.num_nodes, key_of(c, by_expert));
        if (!by_expert) {
            // All choices of a rank share the row that the first one numbered.
            const int shared = __shfl_sync(kWarp, index, lane_of_choice(K, c.rank_leader));
            index = c.expert < 0 ? -1 : shared;
        }
        if (c.inside) all.hops.index[int64_t(c.token) * K + c.k] = index;
        write_lists(all, c, index, slot);
    });
}

/// Last pass: rows of near copies begin at `base`, the first row of this rank's by key. The warp
/// goes through the lists that it wrote, several of a lane's entries at a time.
__device__ inline void add_bases(const epcomm_cuda_two_hop_layout& all, const int* base) {
    const epcomm_cuda_layout& call = all.call;
    const int K = call.world.num_topk, per_rank = call.world.num_experts / call.world.num_ranks;
    const bool by_expert = call.row.layout == EPCOMM_LAYOUT_EXPERT;
    const Share share = step_share(call);
    epcomm_cuda_dest* dests = call.routes.dests + int64_t(share.begin) * K;
    const int64_t* ids = call.routes.topk_idx + int64_t(share.begin) * K;
    const int end = (share.end - share.begin) * K;
    for (int first = lane_id(); first < end; first += 32 * kLoadsTogether) {
        epcomm_cuda_dest dest[kLoadsTogether];
        int key[kLoadsTogether];
#pragma unroll
        for (int i = 0; i < kLoadsTogether; ++i) {
            dest[i] = {int16_t(-1), int16_t(-1), -1};
            if (first + 32 * i < end) dest[i] = dests[first + 32 * i];
        }
#pragma unroll
        for (int i = 0; i < kLoadsTogether; ++i) {
            key[i] = dest[i].rank;
            if (!by_expert || dest[i].rank < 0) continue;
            const int at = first + 32 * i, expert = int(ids[at - at % K + dest[i].choice]);
            key[i] = dest[i].rank * per_rank + expert % per_rank;
        }
#pragma unroll
        for (int i = 0; i < kLoadsTogether; ++i) {
            if (key[i] >= 0) dests[first + 32 * i].row = dest[i].row + base[key[i]];
        }
    }
}

}  // namespace epcomm
