// Layout among nodes, between the passes: from all ranks' counts to the first rows, at the ranks of
// this node, of every source of this rail.
#pragma once

#include "bases.cuh"
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

/// Leave the first row of `source`'s copies for `key` wherever it is wanted.
__device__ __forceinline__ void leave_base(const epcomm_cuda_world& world,
                                           const epcomm_cuda_rail& rail, const TwoHopBases& to,
                                           int source, int key, int first) {
    if (source == world.rank) to.own_base[key] = first;
    if (!to.leads) return;
    const epcomm_cuda_place place = rail.places[source];
    if (place.local == world.local_rank) to.base[place.node * to.num_keys + key] = first;
}

/// Layout rank: a key is a local rank. A warp per rank, a lane per source.
__device__ inline void two_hop_bases_by_rank(const epcomm_cuda_world& world,
                                             const epcomm_cuda_rail& rail, uint64_t epoch,
                                             const TwoHopBases& to) {
    const int R = world.num_ranks, lane = lane_id();
    const int ranks = to.leads ? R : world.num_local;
    for (int i = warp_id(); i < ranks; i += int(blockDim.x >> 5)) {
        const int r = to.leads ? i : world.node_ranks[i];
        const epcomm_cuda_place place = rail.places[r];
        const bool here = place.node == rail.chunking.node;
        int total = 0;
        for (int first = 0; first < R; first += 32) {
            const int s = first + lane;
            const int count = s < R ? rows_from(world, s, epoch)[r] : 0;
            const int sum = sum_to_lane(count);
            if (s < R && here) leave_base(world, rail, to, s, place.local, total + sum - count);
            total += __shfl_sync(kWarp, sum, 31);
        }
        if (lane == 0 && to.leads) to.rows[r] = total;
    }
}

/// Layout expert: a key is an expert of this node. A warp per rank, a lane per expert.
__device__ inline void two_hop_bases_by_expert(const epcomm_cuda_world& world,
                                               const epcomm_cuda_rail& rail, int alignment,
                                               uint64_t epoch, const TwoHopBases& to) {
    const int R = world.num_ranks, per_rank = world.num_experts / R, lane = lane_id();
    const int ranks = to.leads ? R : world.num_local;
    for (int i = warp_id(); i < ranks; i += int(blockDim.x >> 5)) {
        const int r = to.leads ? i : world.node_ranks[i];
        const epcomm_cuda_place place = rail.places[r];
        const bool here = place.node == rail.chunking.node, mine = r == world.rank;
        int start = 0;
        for (int chunk = 0; chunk < per_rank; chunk += 32) {
            const int local = chunk + lane, entry = R + r * per_rank + local;
            int total = 0, before = 0;
            if (local < per_rank) total = sum_of_sources(world, epoch, entry, &before);
            const int padded = (total + alignment - 1) / alignment * alignment;
            const int sum = sum_to_lane(padded), first = start + sum - padded;
            if (local < per_rank && here) {
                const int key = place.local * per_rank + local;
                if (to.leads) {
                    // Again, now that the expert's first row is known: the loads are at hand.
                    sum_of_sources(world, epoch, entry, [&](int source, int below) {
                        leave_base(world, rail, to, source, key, first + below);
                    });
                } else {
                    to.own_base[key] = first + before;
                }
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
