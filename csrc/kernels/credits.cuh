// Bounded staging (csrc/protocol/chunk.h): a place is written again when its reader has said, by a
// credit, that it has read what lay there.
//
// Who waits for a credit waits for a rank that may wait for this one. Nobody waits for ever
// (docs/cuda-memory-model.md has the argument) because
//   - some warps read what arrives from the start, and write nothing before all of it is read;
//   - a warp that writes never waits for one peer while it could write for another: a peer's places
//     may stay in use until that other peer has got something.
#pragma once

#include "chunks.cuh"

namespace epcomm {

/// Which records a warp that sends writes: of `count` peers, those of step `first`, `first` +
/// `stride`, ..., every `members`-th record. So no two warps ask for the same record, and none
/// holds one that it cannot write yet. In shared memory, because registers are what its warp lacks.
struct SendShare {
    int first;
    int stride;
    int count;
    int members;
    int next[1];  ///< slot to write next, of each of the peers

    /// Bytes of one of `senders` warps. With fewer warps than peers a warp has several, else a peer
    /// has several warps.
    __host__ __device__ static int bytes(int peers, int senders) {
        return int(sizeof(SendShare)) + 4 * ((peers + senders - 1) / senders - 1);
    }

    /// Fill in that of warp `sender`. The whole warp.
    __device__ void deal(int peers, int senders, int sender) {
        const int step = sender % peers, num_peers = (peers - step + senders - 1) / senders;
        if (lane_id() == 0) {
            first = step;
            stride = senders;
            count = num_peers;
            members = (senders - step + peers - 1) / peers;
        }
        for (int i = lane_id(); i < num_peers; i += 32) next[i] = sender / peers;
        __syncwarp();
    }

    __device__ int node(const epcomm_chunking& chunking, int i) const {
        return epcomm_send_node(&chunking, first + i * stride);
    }

    /// A record has been written; true: the next one is of the same chunk. The whole warp.
    __device__ bool advance(const epcomm_chunking& chunking, int i) {
        const int slot = next[i];
        __syncwarp();
        if (lane_id() == 0) next[i] = slot + members;
        __syncwarp();
        return (slot + members) / chunking.chunk_records == slot / chunking.chunk_records;
    }

    /// Whether records are left for a peer.
    __device__ bool left(const epcomm_chunking& chunking, const int32_t* records, int i) const {
        return i < count && next[i] < records[epcomm_peer_index(chunking.node, node(chunking, i))];
    }
};

/// The share of this warp if it is one of the first `senders` of its block, at its place in
/// `shared` memory. The whole warp.
__device__ inline SendShare* deal_share(const epcomm_cuda_rail& rail, uint8_t* shared,
                                        int senders) {
    if (warp_id() >= senders) return nullptr;
    const int peers = rail.chunking.num_nodes - 1, all = int(gridDim.x) * senders;
    const int64_t at = int64_t(warp_id()) * SendShare::bytes(peers, all);
    auto* share = reinterpret_cast<SendShare*>(shared + at);
    share->deal(peers, all, int(blockIdx.x) * senders + warp_id());
    return share;
}

/// The credit that lets a chunk be written.
struct AwaitedCredit {
    const uint64_t* signal;
    uint64_t expected;

    __device__ AwaitedCredit(const epcomm_cuda_rail& rail, int node, int chunk) {
        const epcomm_chunking& chunking = rail.chunking;
        const int place = epcomm_chunk_place(&chunking, chunk);
        const int64_t peer = epcomm_peer_index(chunking.node, node);
        signal = rail.signals + epcomm_credit_signal(&chunking, chunking.node, node, place);
        expected = rail.credited[peer * chunking.held_chunks + place] +
                   uint64_t(epcomm_chunk_lap(&chunking, chunk));
    }
};

/// Whether a slot may be written (acquire). The peer's announcement of this call says that nothing
/// of earlier ones is in use, so the first lap needs no credit.
__device__ inline bool is_free(const epcomm_cuda_rail& rail, int node, int slot) {
    const int chunk = slot / rail.chunking.chunk_records;
    if (epcomm_chunk_lap(&rail.chunking, chunk) == 0) return true;
    const AwaitedCredit credit(rail, node, chunk);
    return load_acquire(credit.signal) >= credit.expected;
}

constexpr int kNoneLeft = -1, kGaveUp = -2;

/// The next of a warp's peers, after peer `last` and in turn, for which it can write. Waits where
/// there is none. The whole warp; or kNoneLeft, or kGaveUp.
template <class Kind>
__device__ inline int next_peer(const epcomm_cuda_world& world, const epcomm_cuda_rail& rail,
                                const int32_t* records, const SendShare* share, int last,
                                Waiting what) {
    const epcomm_chunking& chunking = rail.chunking;
    what.between = 1;  // the reader may itself be waiting for another rank
    Patience patience;
    for (uint32_t turn = 0;; ++turn) {
        int waits = -1;
        for (int from = 1; from <= share->count; from += 32) {
            const int offset = from + lane_id(), mine = (last + offset) % share->count;
            const bool left = offset <= share->count && share->left(chunking, records, mine);
            const bool free = left && is_free(rail, share->node(chunking, mine), share->next[mine]);
            const unsigned ready = __ballot_sync(kWarp, free);
            __syncwarp();  // what one lane acquired is the warp's
            if (ready != 0) return (last + from + __ffs(int(ready)) - 1) % share->count;
            if (left) waits = mine;
        }
        const unsigned waiting = __ballot_sync(kWarp, waits >= 0);
        if (waiting == 0) return kNoneLeft;
        if (turn % kPolls != kPolls - 1) continue;
        // Each lane that waits in turn: it looks for what is wrong with the way to its peer.
        const unsigned higher = waiting & (kWarp << (turn / kPolls % 32));
        const int lane = __ffs(int(higher != 0 ? higher : waiting)) - 1;
        bool ok = true;
        if (lane_id() == lane) {
            const int node = share->node(chunking, waits);
            const AwaitedCredit credit(rail, node, share->next[waits] / chunking.chunk_records);
            typename Kind::Look look(rail, node);
            for (int c = 0; c < chunking.num_channels; ++c) look();
            ok = patience.lasts(world, credit.signal, credit.expected, rail.rail[node], what);
        }
        if (!__all_sync(kWarp, ok)) return kGaveUp;
        patience.looked = __shfl_sync(kWarp, patience.looked, lane);
    }
}

/// As send_in_turn, where a place may have to become free first. `share`: this warp's.
template <class Kind, class Send>
__device__ inline bool send_as_credited(const epcomm_cuda_world& world,
                                        const epcomm_cuda_rail& rail, const int32_t* records,
                                        SendShare* share, const Waiting& what, const Send& send) {
    const epcomm_chunking& chunking = rail.chunking;
    int i = share->count - 1;
    while (true) {
        if (lane_id() == 0) begin_within(world, EPCOMM_CUDA_ROLE_CREDIT, -1, -1);
        i = next_peer<Kind>(world, rail, records, share, i, what);
        if (lane_id() == 0) end_within(world, kLongCreditNs);
        if (i < 0) return i == kNoneLeft;
        bool same_chunk = true;  // then it is the next peer's turn
        while (same_chunk && share->left(chunking, records, i)) {
            if (!send({share->node(chunking, i), share->next[i], 1})) return false;
            same_chunk = share->advance(chunking, i);
        }
    }
}

/// A record of `node` has been read by this warp, which has met since; whoever reads the last one
/// at a place says so to the sender, if that has another chunk for it: `records` are all it sends
/// in this call. One lane; false: the fabric failed.
template <class Kind>
__device__ inline bool read_record(const epcomm_cuda_world& world, const epcomm_cuda_rail& rail,
                                   int node, int slot, int records, const Waiting& what) {
    const epcomm_chunking& chunking = rail.chunking;
    const int chunk = slot / chunking.chunk_records;
    if (chunk + chunking.held_chunks >= epcomm_chunk_count(&chunking, records)) return true;
    const int place = epcomm_chunk_place(&chunking, chunk);
    const int64_t peer = epcomm_peer_index(chunking.node, node);
    uint32_t* count = &rail.emptied[peer * chunking.held_chunks + place];
    // Others follow, so it is a whole chunk.
    if (!is_last_record(count, 1, chunking.chunk_records)) return true;
    const fabric::Lane lane = {node, place % chunking.num_channels};
    const int signal = epcomm_credit_signal(&chunking, node, chunking.node, place);
    if (Kind::signal_add(rail, lane, signal)) return true;
    give_up_sending(world, rail, node, what);
    return false;
}

/// Write and send all records that go to other nodes, as staging asks for it. `share`: this warp's,
/// where that is bounded. Within role `sending.role`.
template <class Kind, class Sending>
__device__ inline bool send_all(const epcomm_cuda_world& world, const epcomm_cuda_rail& rail,
                                const int32_t* records, SendShare* share, const Waiting& what,
                                const Sending& sending) {
    if constexpr (Kind::kBounded) {
        return send_as_credited<Kind>(world, rail, records, share, what, [&](const Records& some) {
            sending.write(some);
            return sending.send(some);
        });
    } else {
        return send_in_turn(world, rail, records, sending);
    }
}

}  // namespace epcomm
