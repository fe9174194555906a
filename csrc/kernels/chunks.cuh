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

/// The same for a record on its way out, in region SEND.
template <class Kind>
__device__ __forceinline__ int64_t send_offset(const epcomm_chunking& chunking, int peer, int slot,
                                               int record_bytes, uint64_t epoch) {
    if constexpr (Kind::kBounded) return staging_offset<Kind>(chunking, peer, slot, record_bytes);
    return epcomm_send_offset(&chunking, chunking.node, peer, slot, record_bytes, epoch);
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

/// Count `done` of the `length` records that warps write or read at a place, in any order; true for
/// whoever counts the last. One lane, after the warp's barrier.
///
/// Every warp's accesses are ordered before its addition by the warp's barrier and the fence; the
/// last one has read all additions, and what the fabric releases after the second fence covers
/// them.
__device__ inline bool is_last_record(uint32_t* count, int done, int length) {
    __threadfence();
    if (int(atomicAdd(count, uint32_t(done))) + done != length) return false;
    *count = 0;  // nobody counts here before the next call, or lap
    __threadfence();
    return true;
}

/// Consecutive records to or from a node, of one chunk.
struct Records {
    int node;
    int slot;
    int count;
};

/// Records that this warp has just written in the staging for their node, of `total` in the call;
/// whoever completes a chunk sends it. The whole warp; false: the fabric failed.
template <class Kind>
__device__ inline bool written(const epcomm_cuda_world& world, const epcomm_cuda_rail& rail,
                               const Records& records, int total, int record_bytes,
                               const Waiting& what) {
    const epcomm_chunking& chunking = rail.chunking;
    const int node = records.node;
    bool ok = true;
    __syncwarp();
    if (lane_id() == 0) {
        const int chunk = records.slot / chunking.chunk_records;
        const int length = epcomm_chunk_length(&chunking, total, chunk);
        const int peer = epcomm_peer_index(chunking.node, node);
        const int place = place_of<Kind>(chunking, chunk);
        if (is_last_record(&rail.filled[int64_t(peer) * chunking.held_chunks + place],
                           records.count, length)) {
            const int64_t from = send_offset<Kind>(chunking, node, chunk * chunking.chunk_records,
                                                   record_bytes, what.epoch);
            const int64_t to = epcomm_slot_offset(&chunking, node, chunking.node,
                                                  place * chunking.chunk_records, record_bytes);
            const Put put = {{node, place % chunking.num_channels},
                             {EPCOMM_REGION_RECEIVE, 0, uint64_t(to)},
                             {EPCOMM_REGION_SEND, 0, uint64_t(from)},
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

/// Records dealt together: consecutive ones of one chunk, which a warp's lanes look at as (record,
/// choice) where they are enough.
__device__ __forceinline__ int records_together(const epcomm_chunking& chunking, int num_topk) {
    const int group = num_topk <= 8 ? 4 : num_topk <= 16 ? 2 : 1;
    return chunking.chunk_records % group == 0 ? group : 1;
}

/// Those of a range of items that there are: `records` of each peer. `sending`: whether their node
/// is the one that items go to, or come from.
__device__ __forceinline__ Records records_of(const epcomm_chunking& chunking, const Range& range,
                                              const int32_t* records, bool sending) {
    const epcomm_chunk_item found = epcomm_item_of(&chunking, range.first);
    const int node = sending ? epcomm_send_node(&chunking, found.step)
                             : epcomm_receive_node(&chunking, found.step);
    const int left = records[epcomm_peer_index(chunking.node, node)] - found.slot;
    return {node, found.slot, max(min(range.count, left), 0)};
}

/// The deck of all records to, or from, other nodes.
__device__ __forceinline__ GroupedDeck deck_of(const epcomm_chunking& chunking,
                                               const int32_t* records, int group, int before,
                                               int after) {
    const int items = epcomm_num_items(&chunking, most_records(records, chunking.num_nodes - 1));
    return {items, group, before, after};
}

/// What a warp does with records that go to other nodes.
template <class Write, class Send, class Await>
struct Sending {
    const Write& write;  ///< write consecutive ones in staging
    const Send& send;    ///< they are written; false: the fabric failed
    const Await& await;  ///< the call's verdict, or kNoVerdict; the whole block
    int* verdict;        ///< kNoVerdict: not known yet
    epcomm_cuda_role role;

    /// Wait for the verdict; whether there is anything to send.
    __device__ __forceinline__ bool pass_gate(const epcomm_cuda_world& world) const {
        end_role(world);
        *verdict = await();
        begin_role(world, role);
        return *verdict == EPCOMM_CUDA_OK;
    }
};

/// Write and send all records that go to other nodes, chunk by chunk, `records` of each peer. The
/// first ones of all warps go alone: the line waits for them. Where the call's verdict is not known
/// yet, a warp first writes what it may write ahead. False: leave.
template <class Sending>
__device__ inline bool send_in_turn(const epcomm_cuda_world& world, const epcomm_cuda_rail& rail,
                                    const int32_t* records, const Sending& sending) {
    const epcomm_chunking& chunking = rail.chunking;
    const GroupedDeck deck = deck_of(chunking, records, records_together(chunking, world.num_topk),
                                     num_warps_of_call(), 0);
    Dealer dealer;
    Records found = {0, 0, 0};
    bool ahead = *sending.verdict == kNoVerdict;
    for (bool kept = false;;) {
        if (!kept) {
            int take = lane_id() == 0 ? dealer.take(rail.dealt, deck.takes()) : 0;
            take = __shfl_sync(kWarp, take, 0);
            if (take < 0 && !ahead) return true;
            found =
                take < 0 ? Records{0, 0, 0} : records_of(chunking, deck.range(take), records, true);
        }
        kept = ahead && found.count > 0 && found.slot >= chunking.ahead_records;
        if (found.count > 0 && !kept) sending.write(found);
        if (ahead) {
            if (!sending.pass_gate(world)) return false;
            ahead = false;
            if (kept) continue;
        }
        if (found.count > 0 && !sending.send(found)) return false;
    }
}

/// Count what came to every place in this call. The last block; every warp of the launch has read
/// what it needs.
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
}

/// The decks as dealt, whatever became of the call. The last block.
__device__ inline void collect_decks(const epcomm_cuda_rail& rail) {
    if (threadIdx.x < 2) rail.dealt[threadIdx.x] = 0;
}

}  // namespace epcomm
