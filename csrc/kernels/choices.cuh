// Layout among nodes: one choice a lane. A step takes as many whole tokens as fit into a warp, so
// that the choices of a token see each other by shuffles.
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
    bool leads_rank;  ///< the token's first choice of that rank
    bool leads_node;
};

/// Tokens of a step. K is at most a warp.
__device__ __forceinline__ int tokens_per_step(int num_topk) { return 32 / num_topk; }

/// The lane that holds choice j of this lane's token.
__device__ __forceinline__ int lane_of_choice(int num_topk, int j) {
    return (lane_id() / num_topk * num_topk + j) & 31;
}

/// Choices of the step that begins at token `first`. The whole warp. With `bad_choice`, the place
/// of an id out of range or chosen before by the same token is left there.
__device__ inline Choice choice_of(const epcomm_cuda_two_hop_layout& all, int first, int end,
                                   int32_t* bad_choice) {
    const epcomm_cuda_layout& call = all.call;
    const int K = call.world.num_topk, E = call.world.num_experts;
    const int in_step = lane_id() / K;
    Choice c;
    c.token = first + in_step;
    c.k = lane_id() % K;
    c.inside = in_step < tokens_per_step(K) && c.token < end;
    const int64_t id = c.inside ? call.routes.topk_idx[int64_t(c.token) * K + c.k] : -1;
    const bool valid = id >= 0 && id < E;
    if (bad_choice != nullptr && !valid && id != -1) atomicMin(bad_choice, c.token * K + c.k);
    c.expert = valid ? int(id) : -1;
    c.rank = valid ? c.expert / (E / call.world.num_ranks) : -1;
    c.node = valid ? all.rail.places[c.rank].node : -1;
    c.leads_rank = c.leads_node = valid;
    for (int j = 0; j < K; ++j) {
        const int lane = lane_of_choice(K, j);
        const int expert = __shfl_sync(kWarp, c.expert, lane);
        const int rank = __shfl_sync(kWarp, c.rank, lane);
        const int node = __shfl_sync(kWarp, c.node, lane);
        if (j >= c.k || expert < 0) continue;
        if (expert == c.expert && bad_choice != nullptr) {
            atomicMin(bad_choice, c.token * K + c.k);
        }
        c.leads_rank = c.leads_rank && rank != c.rank;
        c.leads_node = c.leads_node && node != c.node;
    }
    return c;
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
    const Share share = warp_share(call.routes.num_tokens);
    for (int t = share.begin; t < share.end; t += tokens_per_step(call.world.num_topk)) {
        const Choice c = choice_of(all, t, share.end, &own_control(call.world)->bad_choice);
        if (c.leads_node) atomicAdd(&warp_bins[c.node], 1);
        const int key = key_of(c, by_expert), other = key_of(c, !by_expert);
        if (key >= 0) atomicAdd(&keys[key], 1);
        if (other >= 0) atomicAdd(&other_bins[other], 1);
    }
    __syncwarp();
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
/// warp. `index`: of the choice's row; `slot`: of the record that the choice leads.
__device__ inline void write_lists(const epcomm_cuda_two_hop_layout& all, const Choice& c,
                                   int index, int slot, const int* base) {
    const epcomm_cuda_layout& call = all.call;
    const epcomm_cuda_rail& rail = all.rail;
    const int K = call.world.num_topk, F = all.hops.max_far, own = rail.chunking.node;
    const bool near = c.node == own, sends = c.leads_node && !near;
    int num_near = 0, num_far = 0, near_at = 0, far_at = 0;
    for (int j = 0; j < K; ++j) {
        const int lane = lane_of_choice(K, j);
        const int rank = __shfl_sync(kWarp, c.rank, lane);
        const int node = __shfl_sync(kWarp, c.node, lane);
        const bool other_sends = __shfl_sync(kWarp, int(sends), lane);
        if (node == own) {
            ++num_near;
            near_at += rank < c.rank || (rank == c.rank && j < c.k);
        }
        if (other_sends) {
            ++num_far;
            far_at += node < c.node;
        }
    }
    if (!c.inside) return;
    epcomm_cuda_dest* dests = call.routes.dests + int64_t(c.token) * K;
    epcomm_cuda_far* far = all.hops.far + int64_t(c.token) * F;
    if (c.k >= num_near) dests[c.k] = {int16_t(-1), int16_t(-1), -1};
    if (c.k >= num_far && c.k < F) far[c.k] = {-1, -1};
    if (near) {
        const int local = rail.places[c.rank].local;
        const int per_rank = call.world.num_experts / call.world.num_ranks;
        const int key = call.row.layout == EPCOMM_LAYOUT_EXPERT
                            ? local * per_rank + c.expert % per_rank
                            : local;
        dests[near_at] = {int16_t(local), int16_t(c.k), base[key] + index};
    }
    if (sends) {
        far[far_at] = {c.node, slot};
        all.hops
            .token_of[int64_t(epcomm_peer_index(own, c.node)) * rail.chunking.max_records + slot] =
            c.token;
    }
}

/// Second pass: number every row and record. `next`: this warp's first numbers, laid out as
/// `warp_bins`; `base`: first row of this rank's copies on its own node, by key.
__device__ inline void place_choices(const epcomm_cuda_two_hop_layout& all, int* next,
                                     const int* base) {
    const epcomm_cuda_layout& call = all.call;
    const int K = call.world.num_topk;
    const bool by_expert = call.row.layout == EPCOMM_LAYOUT_EXPERT;
    const Share share = warp_share(call.routes.num_tokens);
    for (int t = share.begin; t < share.end; t += tokens_per_step(K)) {
        const Choice c = choice_of(all, t, share.end, nullptr);
        const int slot = number(next, c.leads_node ? c.node : -1);
        int index = number(next + call.world.num_nodes, key_of(c, by_expert));
        if (!by_expert) {
            // All choices of a rank share the row that the first one numbered.
            int shared = index;
            for (int j = 0; j < K; ++j) {
                const int lane = lane_of_choice(K, j);
                const int rank = __shfl_sync(kWarp, c.rank, lane);
                const int found = __shfl_sync(kWarp, index, lane);
                if (rank == c.rank && found >= 0) shared = found;
            }
            index = c.expert < 0 ? -1 : shared;
        }
        if (c.inside) all.hops.index[int64_t(c.token) * K + c.k] = index;
        write_lists(all, c, index, slot, base);
    }
}

}  // namespace epcomm
