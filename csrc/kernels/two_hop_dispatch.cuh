// Dispatch among nodes, data. Every warp writes records for other nodes, then stores rows in its
// own node, then stores the rows of records that arrive. Sends come first and forwarding last, so
// nobody waits while others need what it holds, and no SMs are set aside for a role. Where staging
// is bounded, some warps of each block send first and others forward first. Where rows are packed
// on their way, those of its own node mostly go along with a record: packing is what they cost.
//
// A warp takes a few rows at a time, because what must be known of a row takes as many trips to
// memory as its payload: so many lanes look at once.
#pragma once

#include "call.cuh"
#include "pad.cuh"
#include "two_hop_rows.cuh"

namespace epcomm {

constexpr int kTwoHopThreads = 512;

/// Wait until all ranks have announced the call, and find what the node's have to offer. The
/// verdict, or kNoVerdict: gave up. The whole block. Not inline: a kernel has it twice.
template <class Kind>
__device__ __noinline__ int await_dispatch(const epcomm_cuda_two_hop_dispatch& all, uint64_t epoch,
                                           Target* targets) {
    const epcomm_cuda_dispatch& call = all.call;
    const epcomm_cuda_world& world = call.world;
    const Waiting what = {call.announcement.op, EPCOMM_PHASE_ANNOUNCE, epoch,
                          fabric_failed<Kind>(all.rail)};
    if (!await_world<Kind>(world, all.rail, call.announce, call.number, what)) return kNoVerdict;
    int verdict = judge_all(world, call.announcement, call.row, call.routes.rows, epoch);
    if (call.announce && verdict == EPCOMM_CUDA_OK) verdict = judge_routes(call.routes);
    if (call.announce && blockIdx.x == 0 && threadIdx.x == 0) {
        report_verdict(world, verdict, epoch, call.number);
    }
    if (verdict == EPCOMM_CUDA_OK) {
        find_targets(call, epoch, targets);
        __syncthreads();
        clear_unused(call, targets[world.local_rank]);
    }
    return verdict;
}

/// Store the row of a token, and its scales: as `feed` brings it, or packed on its way.
template <int packing, class Source>
__device__ __forceinline__ void move_token(const TwoHop& hop, const Move& move,
                                           RowFeed<Source>& feed) {
    const epcomm_cuda_dispatch& call = hop.all.call;
    if constexpr (packing == 0) {
        move_with_scales(move, call.row.scale_bytes / 4, feed);
    } else {
        pack_with_scales<packing == 2>(move, call, hop.area);
    }
}

/// Whether rows are packed once for both hops. Not where staging is bounded: senders would be what
/// all wait for.
template <class Kind, int packing>
constexpr bool kPacksOnce = packing != 0 && !Kind::kBounded;

/// Whether a token's rows in this node are stored with the first of its records, which is `first`.
/// Not with those that may be written ahead of the verdict: nobody knows the windows then.
__device__ __forceinline__ bool goes_along(const epcomm_chunking& chunking,
                                           const epcomm_cuda_far& first) {
    return first.node >= 0 && first.slot >= chunking.ahead_records;
}

/// Write records for another node, and the rows in this one that go along with them.
template <class Kind, int packing>
__device__ __forceinline__ void write_records(const TwoHop& hop, const Records& records) {
    const epcomm_cuda_two_hop_dispatch& all = hop.all;
    const epcomm_cuda_dispatch& call = all.call;
    const epcomm_chunking& chunking = all.rail.chunking;
    const int K = call.world.num_topk, peer = epcomm_peer_index(chunking.node, records.node);
    const Seat seat(K, records.count);
    int token = 0, index = -1;
    Copy copy = {-1, -1, -1};
    if (seat.taken) {
        token = all.hops.token_of[int64_t(peer) * chunking.max_records + records.slot + seat.row];
        index = all.hops.index[int64_t(token) * K + seat.k];
        if constexpr (kPacksOnce<Kind, packing>) {
            const epcomm_cuda_far first = all.hops.far[int64_t(token) * all.hops.max_far];
            if (first.node == records.node && goes_along(chunking, first)) {
                copy = copy_of(call.routes.dests[int64_t(token) * K + seat.k]);
            }
        }
    }
    const auto source = [&](int row) {
        return row_of_token(call, __shfl_sync(kWarp, token, row * K));
    };
    // Rows that are packed come through registers.
    const unsigned fed = packing == 0 ? (1u << records.count) - 1 : 0;
    RowFeed feed(source, fed, call.row.row_bytes, hop.feed);
    uint8_t* first = all.rail.send + send_offset<Kind>(chunking, records.node, records.slot,
                                                       all.record.bytes, hop.what.epoch);
    const Labels labels = labels_of_tokens(call, seat, token);
    write_record_labels(hop, seat, records.node, first + int64_t(seat.row) * all.record.bytes,
                        labels, index);
    for (int r = 0; r < records.count; ++r) {
        const int of = __shfl_sync(kWarp, token, r * K);
        delay_row(call.world, of);
        count_item(call.world);
        Move move = move_of_token(call, of);
        if constexpr (kPacksOnce<Kind, packing>) {
            const CopyList copies = list_of_row(copy, r, K, call.row.layout);
            if (copies.count != 0) {
                aim(call, hop.targets, copies, &move);
                store_row_labels(call, hop.targets, copies, labels_of_row(labels, r, K));
            }
        }
        aim_at_record(first + int64_t(r) * all.record.bytes, all.record.scales, &move);
        move_token<packing>(hop, move, feed);
    }
}

/// Records for another node are written; the warp that completes a chunk sends it.
template <class Kind>
__device__ __forceinline__ bool send_written(const TwoHop& hop, const Records& records) {
    const epcomm_cuda_two_hop_dispatch& all = hop.all;
    const int peer = epcomm_peer_index(all.rail.chunking.node, records.node);
    return written<Kind>(all.call.world, all.rail, records, all.hops.sent[peer], all.record.bytes,
                         hop.what);
}

/// Warps of a block that send first where staging is bounded.
__host__ __device__ inline int dispatch_senders(int warps) { return warps < 8 ? 1 : warps / 4; }

/// Role: write the records for other nodes. `verdict`: awaited on the way if it is not known yet.
template <class Kind, int packing>
__device__ inline bool send_records(const TwoHop& hop, int* verdict) {
    const auto write = [&](const Records& records) { write_records<Kind, packing>(hop, records); };
    const auto send = [&](const Records& records) { return send_written<Kind>(hop, records); };
    const auto await = [&] { return await_dispatch<Kind>(hop.all, hop.what.epoch, hop.targets); };
    const epcomm_cuda_two_hop_dispatch& all = hop.all;
    begin_role(all.call.world, EPCOMM_CUDA_ROLE_PACK);
    const bool ok = send_all<Kind>(all.call.world, all.rail, all.hops.sent, hop.share, hop.what,
                                   Sending<decltype(write), decltype(send), decltype(await)>{
                                       write, send, await, verdict, EPCOMM_CUDA_ROLE_PACK});
    end_role(all.call.world);
    return ok;
}

/// Store the rows of some of this rank's tokens in its own node, but for those that go along with
/// a record.
template <class Kind, int packing>
__device__ __forceinline__ void store_tokens(const TwoHop& hop, const Range& tokens) {
    const epcomm_cuda_dispatch& call = hop.all.call;
    const epcomm_cuda_hops& hops = hop.all.hops;
    const int K = call.world.num_topk;
    const Seat seat(K, tokens.count);
    Copy copy = {-1, -1, -1};
    if (seat.taken) {
        const int64_t token = tokens.first + seat.row;
        copy = copy_of(call.routes.dests[token * K + seat.k]);
        if constexpr (kPacksOnce<Kind, packing>) {
            const epcomm_cuda_far first = hops.far[token * hops.max_far];
            if (goes_along(hop.all.rail.chunking, first)) copy.local = -1;
        }
    }
    // Rows without a copy in this node do not come.
    unsigned fed = 0;
    const unsigned copies_here = __ballot_sync(kWarp, copy.local >= 0);
    for (int r = 0; packing == 0 && r < tokens.count; ++r) {
        const unsigned own = copies_here >> r * K & (K < 32 ? (1u << K) - 1 : kWarp);
        fed |= unsigned(own != 0) << r;
    }
    const auto source = [&](int row) { return row_of_token(call, tokens.first + row); };
    RowFeed feed(source, fed, call.row.row_bytes, hop.feed);
    const Labels labels = labels_of_tokens(call, seat, tokens.first + seat.row);
    for (int r = 0; r < tokens.count; ++r) {
        const CopyList copies = list_of_row(copy, r, K, call.row.layout);
        if (copies.count == 0) continue;
        count_item(call.world);
        Move move = move_of_token(call, tokens.first + r);
        aim(call, hop.targets, copies, &move);
        store_row_labels(call, hop.targets, copies, labels_of_row(labels, r, K));
        move_token<packing>(hop, move, feed);
    }
}

/// Role: store the rows of this rank's tokens in its own node.
template <class Kind, int packing>
__device__ inline void store_near(const TwoHop& hop) {
    const epcomm_cuda_world& world = hop.all.call.world;
    const GroupedDeck deck(hop.all.call.routes.num_tokens,
                           records_together(hop.all.rail.chunking, world.num_topk), 0,
                           num_warps_of_call());
    uint32_t* dealt = &own_control(world)->dealt;
    auto dealer = dealer_of<Kind>(dealt);
    begin_role(world, EPCOMM_CUDA_ROLE_STORE);
    while (true) {
        int take = lane_id() == 0 ? dealer.take(dealt, deck.takes()) : 0;
        take = __shfl_sync(kWarp, take, 0);
        if (take < 0) break;
        store_tokens<Kind, packing>(hop, deck.range(take));
    }
    end_role(world);
}

/// Store the rows of received records in this node; leaves their lists for the way back. False: the
/// fabric failed.
template <class Kind>
__device__ __forceinline__ bool forward_some(const TwoHop& hop, const Records& records) {
    const epcomm_cuda_two_hop_dispatch& all = hop.all;
    const epcomm_cuda_dispatch& call = all.call;
    const epcomm_chunking& chunking = all.rail.chunking;
    const epcomm_record& layout = all.record;
    const int K = call.world.num_topk, peer = epcomm_peer_index(chunking.node, records.node);
    const uint8_t* first =
        all.rail.receive + staging_offset<Kind>(chunking, records.node, records.slot, layout.bytes);
    const auto source = [&](int row) { return first + int64_t(row) * layout.bytes; };
    RowFeed feed(source, (1u << records.count) - 1, call.row.row_bytes, hop.feed);
    const Seat seat(K, records.count);
    Labels labels = {-1, 0.0f, 0, 0};
    int index = -1;
    if (seat.taken) {
        const uint8_t* record = first + int64_t(seat.row) * layout.bytes;
        const auto* meta = reinterpret_cast<const epcomm_record_meta*>(record + layout.meta);
        labels.source_rank = meta->source_rank;
        labels.source_token = meta->source_token;
        labels.expert = reinterpret_cast<const int32_t*>(record + layout.expert)[seat.k];
        labels.weight = reinterpret_cast<const float*>(record + layout.weight)[seat.k];
        index = reinterpret_cast<const int32_t*>(record + layout.row)[seat.k];
    }
    const int row = row_of_choice(all, records.node, labels.expert, index);
    const Copy copy = lists_of_records(all, seat, labels.expert, row);
    if (all.forward_list && seat.taken) {
        const int64_t at = int64_t(peer) * chunking.max_records + records.slot + seat.row;
        all.hops.forwarded[at * K + seat.k] = {int16_t(copy.local), int16_t(copy.choice), copy.row};
    }
    for (int r = 0; r < records.count; ++r) {
        delay_row(call.world, records.slot + r);
        count_item(call.world);
        const CopyList copies = list_of_row(copy, r, K, call.row.layout);
        Move move = {};
        move.words = reinterpret_cast<const uint32_t*>(source(r) + layout.scales);
        aim(call, hop.targets, copies, &move);
        store_row_labels(call, hop.targets, copies, labels_of_row(labels, r, K));
        move_with_scales(move, call.row.scale_bytes / 4, feed);
    }
    bool ok = true;
    if constexpr (Kind::kBounded) {
        __syncwarp();
        ok = lane_id() >= records.count ||
             read_record<Kind>(call.world, all.rail, records.node, records.slot + lane_id(),
                               all.hops.received[peer], hop.what);
        ok = __all_sync(kWarp, ok) != 0;
    }
    return ok;
}

/// Role: forward what arrives, first chunks of all peers first. The last chunks' records go alone,
/// so that many warps share what comes at the very end.
template <class Kind>
__device__ inline bool forward_records(const TwoHop& hop) {
    const epcomm_cuda_world& world = hop.all.call.world;
    const epcomm_cuda_rail& rail = hop.all.rail;
    const int32_t* received = hop.all.hops.received;
    const GroupedDeck deck =
        deck_of(rail.chunking, received, records_together(rail.chunking, world.num_topk), 0,
                2 * rail.chunking.chunk_records);
    uint32_t* dealt = rail.dealt + 1;
    auto dealer = dealer_of<Kind>(dealt);
    Arrivals arrivals;
    begin_role(world, EPCOMM_CUDA_ROLE_FORWARD);
    while (true) {
        int take = lane_id() == 0 ? dealer.take(dealt, deck.takes()) : 0;
        take = __shfl_sync(kWarp, take, 0);
        if (take < 0) break;
        const Records found = records_of(rail.chunking, deck.range(take), received, false);
        if (found.count == 0) continue;
        if (!arrivals.wait<Kind>(world, rail, found.node, found.slot, hop.what)) return false;
        if (!forward_some<Kind>(hop, found)) return false;
    }
    end_role(world);
    return true;
}

/// Role: all of them, one after the other; or first what the others wait for, then what is left.
/// A quarter of the warps send and a quarter store in their own node first, where there are enough.
template <class Kind, int packing>
__device__ inline bool move_records(const TwoHop& hop, int* verdict) {
    if constexpr (!Kind::kBounded) {
        if (!send_records<Kind, packing>(hop, verdict)) return false;
        store_near<Kind, packing>(hop);
        return forward_records<Kind>(hop);
    } else {
        const int warps = int(blockDim.x >> 5), senders = dispatch_senders(warps);
        if (warp_id() < senders && !send_records<Kind, packing>(hop, verdict)) {
            return false;
        }
        const bool near_first = warp_id() < (warps < 8 ? senders : 2 * senders);
        bool ok = true;
        for (int step = 0; step < 2 && ok; ++step) {
            if (near_first == (step == 0)) {
                store_near<Kind, packing>(hop);
            } else {
                ok = forward_records<Kind>(hop);
            }
        }
        return ok;
    }
}

/// Shared memory: feeds | targets | scales areas | shares of the warps that send.
__host__ __device__ inline int64_t two_hop_dispatch_areas(const epcomm_cuda_dispatch& call,
                                                          int packing) {
    return int64_t(call.num_warps) * kFeedBytes + int64_t(call.world.num_local) * sizeof(Target) +
           (packing == 0 ? 0 : int64_t(call.num_warps) * call.row.scale_bytes);
}

__host__ inline int64_t two_hop_dispatch_shared(const epcomm_cuda_two_hop_dispatch& all,
                                                int packing) {
    const int64_t areas = two_hop_dispatch_areas(all.call, packing);
    if (!epcomm_is_bounded(&all.rail.chunking)) return areas;
    const int senders = dispatch_senders(all.call.num_warps);
    return areas + senders * SendShare::bytes(all.rail.chunking.num_nodes - 1,
                                              all.call.num_blocks * senders);
}

template <class Kind, int packing>
__global__ void __launch_bounds__(kTwoHopThreads, 1)
    two_hop_dispatch_kernel(const __grid_constant__ epcomm_cuda_two_hop_dispatch all) {
    extern __shared__ __align__(128) uint8_t shared_bytes[];
    const epcomm_cuda_dispatch& call = all.call;
    const epcomm_cuda_world& world = call.world;
    uint8_t* feeds_end = shared_bytes + call.num_warps * kFeedBytes;
    auto* targets = reinterpret_cast<Target*>(feeds_end);
    auto* area = reinterpret_cast<uint32_t*>(feeds_end + world.num_local * sizeof(Target) +
                                             (packing == 0 ? 0 : warp_id() * call.row.scale_bytes));
    if (packing != 0) {
        for (int i = lane_id(); i < call.row.scale_bytes / 4; i += 32) area[i] = 0;
    }
    SendShare* share = nullptr;
    if constexpr (Kind::kBounded) {
        share = deal_share(all.rail, shared_bytes + two_hop_dispatch_areas(call, packing),
                           dispatch_senders(int(blockDim.x >> 5)));
    }
    const uint64_t epoch = begin_call(world);
    if (epoch == 0) return;
    const bool timed = blockIdx.x == 0 && threadIdx.x == 0;
    if (timed) {
        stamp(world, call.number,
              call.announce ? EPCOMM_CUDA_STAMP_START : EPCOMM_CUDA_STAMP_PLACED);
    }
    Waiting what = {call.announcement.op, EPCOMM_PHASE_ANNOUNCE, epoch,
                    fabric_failed<Kind>(all.rail)};
    if (call.announce && blockIdx.x == 0 &&
        !announce_to_world<Kind>(world, all.rail, call.announcement, call.announcement.status, {},
                                 what)) {
        return;
    }
    // The announcements of a first call have been waited for.
    const bool ahead = call.announce && writes_ahead(all.rail, call.announcement, call.routes);
    int verdict = ahead ? kNoVerdict : await_dispatch<Kind>(all, epoch, targets);
    if (ahead || verdict == EPCOMM_CUDA_OK) {
        what.phase = EPCOMM_PHASE_DATA;
        const TwoHop hop = {all, targets, area, shared_bytes + warp_id() * kFeedBytes, share, what};
        const bool moved = move_records<Kind, packing>(hop, &verdict);
        if (!__syncthreads_and(moved || verdict > EPCOMM_CUDA_OK)) return;
    }
    if (verdict == kNoVerdict) return;
    delay(world, kDelayMoved);
    if (!is_last_block(world)) return;
    if (!settle<Kind>(world, all.rail, what)) return;
    if (verdict == EPCOMM_CUDA_OK) {
        collect_chunks<Kind>(all.rail, all.hops.received, all.hops.sent);
    }
    collect_decks(all.rail);
    note_moved(world, call.number);
    // All ranks come to the same verdict, so after a refusal nobody waits.
    if (verdict == EPCOMM_CUDA_OK) {
        what.phase = EPCOMM_PHASE_ARRIVE;
        what.between = 2;
        if (!meet_node(world, true, what)) return;
    }
    end_call(world, verdict, epoch, call.number, !call.announce);
}

}  // namespace epcomm
