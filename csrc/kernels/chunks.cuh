// Sending and receiving staging in chunks: who writes the last record of a chunk sends it, who
// reads a record waits for its chunk.
#pragma once

#include "relay.cuh"

namespace epcomm {

/// The most records that any peer sends or receives. The whole warp.
__device__ __forceinline__ int most_records(const int32_t* records, int peers) {
    int most = 0;
    for (int p = lane_id(); p < peers; p += 32) most = max(most, records[p]);
    for (int step = 16; step > 0; step /= 2) most = max(most, __shfl_xor_sync(kWarp, most, step));
    return most;
}

/// The chunk of a slot that this warp has just written in the staging for `node`; whoever completes
/// it sends it. The whole warp; false: the fabric failed.
///
/// Every warp's stores are ordered before its addition by the warp's barrier and the fence; the
/// last one has read all additions, and what the fabric releases after the second fence covers
/// them.
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
        const int place = epcomm_peer_index(chunking.node, node);
        __threadfence();
        // atomicInc returns to 0 by itself after the last record.
        const uint32_t before = atomicInc(
            &rail.filled[int64_t(place) * chunking.num_chunks + chunk], uint32_t(length - 1));
        if (before == uint32_t(length - 1)) {
            __threadfence();
            const int first = chunk * chunking.chunk_records;
            const auto at = [&](int32_t region, int from, int to) {
                return epcomm_fabric_place{
                    region, 0,
                    uint64_t(epcomm_slot_offset(&chunking, from, to, first, record_bytes))};
            };
            const Put put = {{node, chunk % chunking.num_channels},
                             at(EPCOMM_REGION_RECEIVE, node, chunking.node),
                             at(EPCOMM_REGION_SEND, chunking.node, node),
                             uint64_t(length) * uint64_t(record_bytes),
                             epcomm_chunk_signal(&chunking, node, chunking.node, chunk)};
            ok = Kind::put_signal(rail, put);
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
        const int at = epcomm_peer_index(chunking.node, node) * chunking.num_chunks + chunk;
        if (at == last) return true;
        bool ok = true;
        if (lane_id() == 0) {
            const int signal = epcomm_chunk_signal(&chunking, chunking.node, node, chunk);
            ok = wait_for_node<Kind>(world, rail, rail.signals + signal, rail.expected[at] + 1,
                                     node, what);
        }
        ok = __shfl_sync(kWarp, int(ok), 0) != 0;
        __syncwarp();  // what the first lane acquired is the warp's
        if (ok) last = at;
        return ok;
    }
};

/// Count the chunks of this call as received, and the decks as dealt. The last block; every warp
/// of the launch has read what it needs.
__device__ inline void collect_chunks(const epcomm_cuda_rail& rail, const int32_t* received) {
    const epcomm_chunking& chunking = rail.chunking;
    for (int p = 0; p < chunking.num_nodes - 1; ++p) {
        const int chunks = epcomm_chunk_count(&chunking, received[p]);
        for (int c = int(threadIdx.x); c < chunks; c += int(blockDim.x)) {
            rail.expected[int64_t(p) * chunking.num_chunks + c] += 1;
        }
    }
    if (threadIdx.x < 2) rail.dealt[threadIdx.x] = 0;
}

}  // namespace epcomm
