// Sending and receiving staging in chunks: who writes the last record of a chunk sends it, who
// reads a record waits for its chunk.
#pragma once

#include "deal.cuh"
#include "relay.cuh"
#include "timeline.cuh"

namespace epcomm {

/// The most records that any peer sends or receives. The whole warp.
__device__ __forceinline__ int most_records(const int32_t* records, int peers) {
    int most = 0;
    for (int p = lane_id(); p < peers; p += 32) most = max(most, records[p]);
    for (int step = 16; step > 0; step /= 2) most = max(most, __shfl_xor_sync(kWarp, most, step));
    return most;
}

/// Where a chunk lies in staging.
template <class Kind>
__device__ __forceinline__ int place_of(const epcomm_chunking& chunking, int chunk) {
    if constexpr (Kind::kBounded) return epcomm_chunk_place(&chunking, chunk);
    return chunk;
}

/// Byte offset of `peer`'s slot in this rank's staging.
template <class Kind>
__device__ __forceinline__ int64_t staging_offset(const epcomm_chunking& chunking, int peer,
                                                  int slot, int record_bytes) {
    if constexpr (Kind::kBounded) slot = epcomm_staging_slot(&chunking, slot);
    return epcomm_slot_offset(&chunking, chunking.node, peer, slot, record_bytes);
}

/// Where staging is bounded, warps have roles of their own and come to a deck in any order.
template <class Kind>
__device__ __forceinline__ auto dealer_of(uint32_t* dealt) {
    if constexpr (Kind::kBounded) {
        return LateDealer(dealt);
    } else {
        return Dealer();
    }
}

/// Count one of the `length` records that warps write or read at a place, in any order; true for
/// the last. One lane, after the warp's barrier.
///
/// Every warp's accesses are ordered before its addition by the warp's barrier and the fence; the
/// last one has read all additions, and what the fabric releases after the second fence covers
/// them.
__device__ inline bool is_last_record(uint32_t* count, int length) {
    __threadfence();
    // atomicInc returns to 0 by itself after the last record.
    if (atomicInc(count, uint32_t(length - 1)) != uint32_t(length - 1)) return false;
    __threadfence();
    return true;
}

/// The chunk of a slot that this warp has just written in the staging for `node`; whoever completes
/// it sends it. The whole warp; false: the fabric failed.
template <class Kind>
__device__ inline bool written(const epcomm_cuda_world& world, const epcomm_cuda_rail& rail,
                               int node, int slot, int records, int record_bytes,
                               const Waiting& what) {
    const epcomm_chunking& chunking = rail.chunking;
    bool ok = true;
    __syncwarp();
    if (lane_id() == 0) {
        const int chunk = slot / chunking.chunk_records;
        const int length = epcomm_chunk_length(&chunking, records, chunk);
        const int peer = epcomm_peer_index(chunking.node, node);
        const int place = place_of<Kind>(chunking, chunk);
        if (is_last_record(&rail.filled[int64_t(peer) * chunking.held_chunks + place], length)) {
            const int first = place * chunking.chunk_records;
            const auto at = [&](int32_t region, int from, int to) {
                return epcomm_fabric_place{
                    region, 0,
                    uint64_t(epcomm_slot_offset(&chunking, from, to, first, record_bytes))};
            };
            const Put put = {{node, place % chunking.num_channels},
                             at(EPCOMM_REGION_RECEIVE, node, chunking.node),
                             at(EPCOMM_REGION_SEND, chunking.node, node),
                             uint64_t(length) * uint64_t(record_bytes),
                             epcomm_chunk_signal(&chunking, node, chunking.node, place)};
            begin_within(world, EPCOMM_CUDA_ROLE_PUT, node, chunk);
            ok = Kind::put_signal(rail, put);
            end_within(world);
            if (!ok) give_up_sending(world, rail, node, what);
        }
    }
    return __shfl_sync(kWarp, int(ok), 0) != 0;
}

/// Remembers the last chunk found here, so that most records need no look at its signal.
struct Arrivals {
    int last = -1;

    /// Wait for the chunk of a slot that `node` sends. The whole warp; false: gave up.
    template <class Kind>
    __device__ bool wait(const epcomm_cuda_world& world, const epcomm_cuda_rail& rail, int node,
                         int slot, const Waiting& what) {
        const epcomm_chunking& chunking = rail.chunking;
        const int chunk = slot / chunking.chunk_records;
        const int peer = epcomm_peer_index(chunking.node, node);
        const int found = peer * chunking.num_chunks + chunk;
        if (found == last) return true;
        bool ok = true;
        if (lane_id() == 0) {
            const int place = place_of<Kind>(chunking, chunk);
            uint64_t expected = rail.expected[int64_t(peer) * chunking.held_chunks + place] + 1;
            if constexpr (Kind::kBounded) expected += uint64_t(epcomm_chunk_lap(&chunking, chunk));
            const int signal = epcomm_chunk_signal(&chunking, chunking.node, node, place);
            const uint64_t* counter = rail.signals + signal;
            if (has_timeline(world)) {
                Noting::begin_wait(counter, expected, node, chunk,
                                   slot == chunk * chunking.chunk_records);
            }
            ok = wait_for_node<Kind>(world, rail, counter, expected, node, what);
            end_within(world);
        }
        ok = __shfl_sync(kWarp, int(ok), 0) != 0;
        __syncwarp();  // what the first lane acquired is the warp's
        if (ok) last = found;
        return ok;
    }
};

/// Write all records that go to other nodes, chunk by chunk: `send(node, slot)` by a whole warp for
/// every record, `records` of each peer; false: the fabric failed.
template <class Send>
__device__ inline bool send_in_turn(const epcomm_cuda_rail& rail, const int32_t* records,
                                    const Send& send) {
    const epcomm_chunking& chunking = rail.chunking;
    const int items = epcomm_num_items(&chunking, most_records(records, chunking.num_nodes - 1));
    Dealer dealer;
    while (true) {
        int item = lane_id() == 0 ? dealer.take(rail.dealt, items) : 0;
        item = __shfl_sync(kWarp, item, 0);
        if (item < 0) return true;
        const epcomm_chunk_item found = epcomm_item_of(&chunking, item);
        const int node = epcomm_send_node(&chunking, found.step);
        if (found.slot >= records[epcomm_peer_index(chunking.node, node)]) continue;
        if (!send(node, found.slot)) return false;
    }
}

/// Count what came to every place in this call, and the decks as dealt. The last block; every warp
/// of the launch has read what it needs.
template <class Kind>
__device__ inline void collect_chunks(const epcomm_cuda_rail& rail, const int32_t* received,
                                      const int32_t* sent) {
    const epcomm_chunking& chunking = rail.chunking;
    for (int p = 0; p < chunking.num_nodes - 1; ++p) {
        const int chunks = epcomm_chunk_count(&chunking, received[p]);
        const int64_t first = int64_t(p) * chunking.held_chunks;
        for (int w = int(threadIdx.x); w < min(chunks, chunking.held_chunks);
             w += int(blockDim.x)) {
            rail.expected[first + w] +=
                Kind::kBounded ? uint64_t(epcomm_num_laps(&chunking, chunks, w)) : 1;
        }
        if constexpr (Kind::kBounded) {
            // The last lap of a place brings no credit.
            const int out = epcomm_chunk_count(&chunking, sent[p]);
            for (int w = int(threadIdx.x); w < min(out, chunking.held_chunks);
                 w += int(blockDim.x)) {
                rail.credited[first + w] += uint64_t(epcomm_num_laps(&chunking, out, w)) - 1;
            }
        }
    }
    if (threadIdx.x < 2) rail.dealt[threadIdx.x] = 0;
}

}  // namespace epcomm
