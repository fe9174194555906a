// Layout among nodes, between the passes: from all ranks' counts to the first rows, at the ranks of
// this node, of every source of this rail.
#pragma once

#include "announce.cuh"
#include "epcomm_cuda_rail.h"

namespace epcomm {

/// Where the first rows go. Block 0 fills in everything; the others need `own_base` only.
struct TwoHopBases {
    bool leads;
    int* rows;        ///< rows every rank will hold, [R]; block 0
    int* own_base;    ///< of this rank's copies at its own node, [keys]
    int32_t* base;    ///< of all sources of the rail, [N, keys]; block 0
    int32_t* starts;  ///< layout expert, block 0: as bases_by_expert
    int32_t* counts;
    int num_keys;
};

/// Layout rank: a key is a local rank. The whole block.
__device__ inline void two_hop_bases_by_rank(const epcomm_cuda_world& world,
                                             const epcomm_cuda_rail& rail, uint64_t epoch,
                                             const TwoHopBases& to) {
    const int own = rail.chunking.node, L = world.num_local;
    const int sources = to.leads ? world.num_nodes : 1;
    for (int i = int(threadIdx.x); i < sources * L; i += int(blockDim.x)) {
        const int n = to.leads ? i / L : own, l = i % L;
        int total = 0;
        for (int s = 0; s < rail.rail[n]; ++s) {
            total += rank_rows_of(world, announcement_from(world, s, epoch))[world.node_ranks[l]];
        }
        if (n == own) to.own_base[l] = total;
        if (to.leads) to.base[n * L + l] = total;
    }
    if (!to.leads) return;
    for (int r = int(threadIdx.x); r < world.num_ranks; r += int(blockDim.x)) {
        int total = 0;
        for (int s = 0; s < world.num_ranks; ++s) {
            total += rank_rows_of(world, announcement_from(world, s, epoch))[r];
        }
        to.rows[r] = total;
    }
}

/// One expert of a rank of this node: the base of every source of the rail. One lane.
__device__ inline void base_of_expert(const epcomm_cuda_world& world, const epcomm_cuda_rail& rail,
                                      uint64_t epoch, const TwoHopBases& to, int expert, int key,
                                      int start) {
    const int own = rail.chunking.node, R = world.num_ranks;
    for (int n = to.leads ? 0 : own; n < (to.leads ? world.num_nodes : own + 1); ++n) {
        int before = 0;
        for (int s = 0; s < rail.rail[n]; ++s) {
            before += rank_rows_of(world, announcement_from(world, s, epoch))[R + expert];
        }
        if (n == own) to.own_base[key] = start + before;
        if (to.leads) to.base[n * to.num_keys + key] = start + before;
    }
}

/// Layout expert: a key is an expert of this node. A warp per rank.
__device__ inline void two_hop_bases_by_expert(const epcomm_cuda_world& world,
                                               const epcomm_cuda_rail& rail, int alignment,
                                               uint64_t epoch, const TwoHopBases& to) {
    const int R = world.num_ranks, per_rank = world.num_experts / R, lane = lane_id();
    const int ranks = to.leads ? R : world.num_local;
    for (int i = warp_id(); i < ranks; i += int(blockDim.x >> 5)) {
        const int r = to.leads ? i : world.node_ranks[i];
        const bool here = rail.places[r].node == rail.chunking.node, mine = r == world.rank;
        int start = 0;
        for (int chunk = 0; chunk < per_rank; chunk += 32) {
            const int local = chunk + lane, expert = r * per_rank + local;
            int total = 0;
            for (int s = 0; s < R && local < per_rank; ++s) {
                total += rank_rows_of(world, announcement_from(world, s, epoch))[R + expert];
            }
            const int padded = (total + alignment - 1) / alignment * alignment;
            int sum = padded;  // inclusive prefix sum over the lanes
            for (int step = 1; step < 32; step *= 2) {
                const int lower = __shfl_up_sync(kWarp, sum, step);
                if (lane >= step) sum += lower;
            }
            const int first = start + sum - padded;
            if (local < per_rank && here) {
                base_of_expert(world, rail, epoch, to, expert,
                               rail.places[r].local * per_rank + local, first);
            }
            if (local < per_rank && mine && to.leads) {
                to.starts[local] = first;
                to.counts[local] = total;
            }
            start += __shfl_sync(kWarp, sum, 31);
        }
        if (lane == 0 && to.leads) {
            to.rows[r] = start;
            if (mine) to.starts[per_rank] = start;
        }
    }
}

/// Records to and from every rail peer. The whole block 0.
__device__ inline void count_records(const epcomm_cuda_world& world, const epcomm_cuda_rail& rail,
                                     uint64_t epoch, int32_t* sent, int32_t* received) {
    const int own = rail.chunking.node;
    const int32_t* mine = node_tokens_of(announcement_from(world, world.rank, epoch));
    for (int n = int(threadIdx.x); n < world.num_nodes; n += int(blockDim.x)) {
        if (n == own) continue;
        const int place = epcomm_peer_index(own, n);
        sent[place] = mine[n];
        received[place] = node_tokens_of(announcement_from(world, rail.rail[n], epoch))[own];
    }
}

}  // namespace epcomm
