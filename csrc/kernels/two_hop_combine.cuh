// Combine among nodes: sum this node's rows of the tokens that were forwarded here and send them
// home; then sum this rank's own tokens over the nodes as their records come back.
//
// Own tokens are taken in one pass, in order: with several nodes nearly every token has a record on
// its way, and records return in the order of tokens too. Where staging is bounded, half of each
// block's warps send first, and the others finish tokens from the start.
#pragma once

#include "call.cuh"
#include "credits.cuh"
#include "seats.cuh"
#include "terms.cuh"
#include "wire.cuh"

namespace epcomm {

/// What a warp's roles share.
struct TwoHopSum {
    const epcomm_cuda_two_hop_combine& all;
    const Offer* offers;
    uint8_t* sums;     ///< shared memory of all warps, where records hold rows as they are
    SendShare* share;  ///< this warp's, if it sends and staging is bounded
    Waiting what;
};

/// Wait until all ranks have announced the call. The verdict, or kNoVerdict: gave up. The whole
/// block. Not inline: a kernel has it several times.
template <class Kind>
__device__ __noinline__ int await_combine(const epcomm_cuda_two_hop_combine& all, uint64_t epoch) {
    const epcomm_cuda_combine& call = all.call;
    const Waiting what = {EPCOMM_OP_COMBINE, EPCOMM_PHASE_ANNOUNCE, epoch,
                          fabric_failed<Kind>(all.rail)};
    if (!await_world<Kind>(call.world, all.rail, true, call.number, what)) return kNoVerdict;
    return judge_combine(call, epoch);
}

/// Whether this rank may reduce its first records before the verdict: its node's ranks have
/// announced that they take part, so their rows can be read. The whole block.
__device__ inline bool reduces_ahead(const epcomm_cuda_two_hop_combine& all, uint64_t epoch) {
    const epcomm_cuda_combine& call = all.call;
    const epcomm_cuda_world& world = call.world;
    if (!writes_ahead(all.rail, call.announcement, call.routes)) return false;
    bool agrees = true;
    for (int l = int(threadIdx.x); l < world.num_local; l += int(blockDim.x)) {
        const epcomm_announcement* theirs = announcement_from(world, world.node_ranks[l], epoch);
        agrees = judge(call.announcement, *theirs, {}, 0) == EPCOMM_CUDA_OK && agrees;
    }
    return __syncthreads_and(agrees) != 0;
}

__device__ __forceinline__ WireRecord wire_record(const TwoHopSum& sum, uint8_t* record) {
    return {record, sum.all.record.scales, sum.all.call.announcement.wire};
}

/// Sum the node's rows of one received record into one to send.
template <class Formats, bool extras>
__device__ __forceinline__ void reduce_record(const TwoHopSum& sum, const CopyList& copies,
                                              uint8_t* record) {
    constexpr bool f32 = Formats::f32;
    const epcomm_cuda_combine& call = sum.all.call;
    const int K = call.world.num_topk;
    if constexpr (Formats::kRaw) {
        const SumPlace place(sum.sums);
        const int near = list_near<extras>(copies, sum.offers, call.row_bytes, place.list);
        __syncwarp();
        sum_terms<f32, extras>({near, near, 0}, place, call.row_bytes,
                               [&](int at, auto& row, auto from_first) {
                                   store_once(record + at, narrow<f32, from_first>(row));
                               });
    } else {
        const NearRows rows = near_rows<extras>(copies, sum.offers, call.row_bytes);
        for (int first = 0; first < call.row_bytes; first += kSumColumns * 32 * 16) {
            Sums<f32> sums;
            sums.clear();
            sum_near<f32, extras>(rows, first, call.row_bytes, &sums);
            store_wire<f32, Formats::wire>(sums, first, call.row_bytes, wire_record(sum, record));
        }
    }
    if (!call.announcement.with_weights) return;
    float weight = 0.0f;
    near_weight(copies, sum.offers, K, call.layout, &weight);
    if (lane_id() < K) {
        reinterpret_cast<float*>(record + sum.all.record.weight)[lane_id()] = weight;
    }
}

/// Reduce records for a rail peer.
template <class Kind, class Formats, bool extras>
__device__ __forceinline__ void reduce_some(const TwoHopSum& sum, const Records& records) {
    const epcomm_cuda_combine& call = sum.all.call;
    const epcomm_cuda_rail& rail = sum.all.rail;
    const epcomm_chunking& chunking = rail.chunking;
    const int K = call.world.num_topk, record_bytes = sum.all.record.bytes;
    const int peer = epcomm_peer_index(chunking.node, records.node);
    const Seat seat(K, records.count);
    Copy copy = {-1, -1, -1};
    if (seat.taken) {
        const int64_t at = int64_t(peer) * chunking.max_records + records.slot + seat.row;
        copy = copy_of(sum.all.hops.forwarded[at * K + seat.k]);
    }
    uint8_t* first = rail.send + send_offset<Kind>(chunking, records.node, records.slot,
                                                   record_bytes, sum.what.epoch);
    for (int r = 0; r < records.count; ++r) {
        delay_row(call.world, records.slot + r);
        count_item(call.world);
        reduce_record<Formats, extras>(sum, list_of_row(copy, r, K, call.layout),
                                       first + int64_t(r) * record_bytes);
    }
}

/// Records for a rail peer are reduced; the warp that completes a chunk sends it.
template <class Kind>
__device__ __forceinline__ bool return_reduced(const TwoHopSum& sum, const Records& records) {
    const epcomm_cuda_rail& rail = sum.all.rail;
    const int peer = epcomm_peer_index(rail.chunking.node, records.node);
    return written<Kind>(sum.all.call.world, rail, records, sum.all.hops.received[peer],
                         sum.all.record.bytes, sum.what);
}

/// Warps of a block that send first where staging is bounded.
__host__ __device__ inline int combine_senders(int warps) { return warps < 4 ? 1 : warps / 2; }

/// Role: reduce for the rail peers. `verdict`: awaited on the way if it is not known yet.
template <class Kind, class Formats, bool extras>
__device__ inline bool return_records(const TwoHopSum& sum, int* verdict) {
    const auto write = [&](const Records& records) {
        reduce_some<Kind, Formats, extras>(sum, records);
    };
    const auto send = [&](const Records& records) { return return_reduced<Kind>(sum, records); };
    const auto await = [&] { return await_combine<Kind>(sum.all, sum.what.epoch); };
    const epcomm_cuda_two_hop_combine& all = sum.all;
    return send_all<Kind>(all.call.world, all.rail, all.hops.received, sum.share, sum.what,
                          Sending<decltype(write), decltype(send), decltype(await)>{
                              write, send, await, verdict, EPCOMM_CUDA_ROLE_REDUCE});
}

/// One of this rank's tokens. What the lanes have of it is on its way while another is summed.
struct OwnToken {
    int token;             ///< -1: there are no more
    epcomm_cuda_dest row;  ///< lane k < K: an entry of the list of its rows in this node
    epcomm_cuda_far far;   ///< lane i < F: its i-th record, in order of nodes; node -1: none
};

/// The next token. The whole warp.
template <class Dealer>
__device__ __forceinline__ OwnToken next_token(const TwoHopSum& sum, Dealer& dealer) {
    const epcomm_cuda_combine& call = sum.all.call;
    const int K = call.world.num_topk, F = sum.all.hops.max_far;
    uint32_t* dealt = &own_control(call.world)->dealt;
    const int taken = lane_id() == 0 ? dealer.take(dealt, call.routes.num_tokens) : 0;
    OwnToken next = {__shfl_sync(kWarp, taken, 0), {-1, -1, -1}, {-1, -1}};
    if (next.token < 0) return next;
    if (lane_id() < K) next.row = call.routes.dests[int64_t(next.token) * K + lane_id()];
    if (lane_id() < F) next.far = sum.all.hops.far[int64_t(next.token) * F + lane_id()];
    return next;
}

/// A token's records: lane i < count holds the node and the address of the i-th.
struct FarRecords {
    int count;
    int node;
    const uint8_t* record;

    /// The i-th record's address. The whole warp.
    __device__ __forceinline__ uint8_t* at(int i) const {
        return shuffle_pointer(const_cast<uint8_t*>(record), i);
    }
};

/// Wait for a token's records. The whole warp; false: gave up.
template <class Kind>
__device__ __forceinline__ bool far_records(const TwoHopSum& sum, const epcomm_cuda_far& mine,
                                            Arrivals* arrivals, FarRecords* far) {
    const epcomm_cuda_rail& rail = sum.all.rail;
    const epcomm_chunking& chunking = rail.chunking;
    far->count = __popc(__ballot_sync(kWarp, mine.node >= 0));
    far->node = mine.node;
    far->record = nullptr;
    if (mine.node >= 0) {
        far->record = rail.receive +
                      staging_offset<Kind>(chunking, mine.node, mine.slot, sum.all.record.bytes);
    }
    for (int i = 0; i < far->count; ++i) {
        const int node = __shfl_sync(kWarp, mine.node, i);
        const int slot = __shfl_sync(kWarp, mine.slot, i);
        if (!arrivals->wait<Kind>(sum.all.call.world, rail, node, slot, sum.what)) return false;
    }
    return true;
}

/// Sum one token over the nodes in their order, add the biases and store the result. `before`: how
/// many of its records are of nodes before this one.
template <class Formats, bool extras>
__device__ __forceinline__ void finish_raw(const TwoHopSum& sum, int token, const CopyList& copies,
                                           const FarRecords& far, int before) {
    constexpr bool f32 = Formats::f32;
    const epcomm_cuda_combine& call = sum.all.call;
    const SumPlace place(sum.sums);
    const int near = list_near<extras>(copies, sum.offers, call.row_bytes, place.list);
    if (lane_id() < far.count) {
        place.list->row[near + lane_id()] = far.record;
        if constexpr (extras) place.list->weight[near + lane_id()] = 1.0f;
    }
    __syncwarp();
    const Result result = result_of(call, token);
    sum_terms<f32, extras>({near + far.count, near, before}, place, call.row_bytes,
                           [&](int at, auto& row, auto from_first) {
                               finish_column<f32, extras, from_first>(result, at, row);
                           });
}

/// The same for records of any format.
template <class Formats, bool extras>
__device__ __forceinline__ void finish_any(const TwoHopSum& sum, int token, const CopyList& copies,
                                           const FarRecords& far, int before) {
    constexpr bool f32 = Formats::f32;
    const epcomm_cuda_combine& call = sum.all.call;
    const NearRows rows = near_rows<extras>(copies, sum.offers, call.row_bytes);
    const Result result = result_of(call, token);
    for (int first = 0; first < call.row_bytes; first += kSumColumns * 32 * 16) {
        Sums<f32> total;
        total.clear();
        for (int i = 0; i <= far.count; ++i) {
            if (i == before && rows.lanes != 0) {
                Sums<f32> part;
                part.clear();
                sum_near<f32, extras>(rows, first, call.row_bytes, &part);
                total.add(part);
            }
            if (i == far.count) break;
            const WireRecord record = wire_record(sum, far.at(i));
            add_wire<f32, Formats::wire>(record, first, call.row_bytes, &total);
        }
#pragma unroll
        for (int u = 0; u < kSumColumns; ++u) {
            const int at = column_at(first, u);
            if (at < call.row_bytes) finish_column<f32, extras>(result, at, total.column[u]);
        }
    }
}

template <class Formats, bool extras>
__device__ __forceinline__ void finish_token(const TwoHopSum& sum, int token,
                                             const CopyList& copies, const FarRecords& far) {
    const int own = sum.all.rail.chunking.node;
    const int before = __popc(__ballot_sync(kWarp, far.node >= 0 && far.node < own));
    if constexpr (Formats::kRaw) {
        finish_raw<Formats, extras>(sum, token, copies, far, before);
    } else {
        finish_any<Formats, extras>(sum, token, copies, far, before);
    }
}

/// Bring every choice's weight home: from this node's rows, or from the record of its node.
__device__ __forceinline__ void finish_weights(const TwoHopSum& sum, int token,
                                               const CopyList& copies, const FarRecords& far) {
    const epcomm_cuda_combine& call = sum.all.call;
    const int K = call.world.num_topk, E = call.world.num_experts, k = lane_id();
    const int64_t id = k < K ? call.routes.topk_idx[int64_t(token) * K + k] : -1;
    const int node =
        id >= 0 && id < E ? sum.all.rail.places[int(id) / (E / call.world.num_ranks)].node : -1;
    float weight = 0.0f;
    near_weight(copies, sum.offers, K, call.layout, &weight);
    for (int i = 0; i < far.count; ++i) {
        const uint8_t* record = far.at(i);
        if (__shfl_sync(kWarp, far.node, i) != node || node < 0) continue;
        weight = reinterpret_cast<const float*>(record + sum.all.record.weight)[k];
    }
    if (k < K) call.topk_weights[int64_t(token) * K + k] = weight;
}

/// Say of a token's records that they have been read. The whole warp; false: the fabric failed.
template <class Kind>
__device__ __forceinline__ bool read_records(const TwoHopSum& sum, const epcomm_cuda_far& mine) {
    const epcomm_cuda_rail& rail = sum.all.rail;
    __syncwarp();
    const bool ok =
        mine.node < 0 ||
        read_record<Kind>(sum.all.call.world, rail, mine.node, mine.slot,
                          sum.all.hops.sent[epcomm_peer_index(rail.chunking.node, mine.node)],
                          sum.what);
    return __all_sync(kWarp, ok) != 0;
}

/// Role: finish this rank's own tokens.
template <class Kind, class Formats, bool extras>
__device__ inline bool finish_tokens(const TwoHopSum& sum) {
    const epcomm_cuda_combine& call = sum.all.call;
    auto dealer = dealer_of<Kind>(&own_control(call.world)->dealt);
    Arrivals arrivals;
    OwnToken next = next_token(sum, dealer);
    while (next.token >= 0) {
        const OwnToken own = next;
        next = next_token(sum, dealer);
        const CopyList copies = list_of_copies(copy_of(own.row), call.layout);
        delay_row(call.world, own.token);
        FarRecords far;
        if (!far_records<Kind>(sum, own.far, &arrivals, &far)) return false;
        count_item(call.world);
        finish_token<Formats, extras>(sum, own.token, copies, far);
        if (call.topk_weights != nullptr) finish_weights(sum, own.token, copies, far);
        if constexpr (Kind::kBounded) {
            if (!read_records<Kind>(sum, own.far)) return false;
        }
    }
    return true;
}

template <class Kind, class Formats, bool extras>
__device__ __forceinline__ bool combine_two_hop(const TwoHopSum& sum, int* verdict) {
    const epcomm_cuda_world& world = sum.all.call.world;
    if (!Kind::kBounded || warp_id() < combine_senders(int(blockDim.x >> 5))) {
        begin_role(world, EPCOMM_CUDA_ROLE_REDUCE);
        if (!return_records<Kind, Formats, extras>(sum, verdict)) return false;
        end_role(world);
    }
    begin_role(world, EPCOMM_CUDA_ROLE_FINISH);
    const bool ok = finish_tokens<Kind, Formats, extras>(sum);
    end_role(world);
    return ok;
}

/// Credits take registers, as do float32 rows and formats found at run time; fewer threads have
/// more each.
template <class Kind, class Formats>
constexpr int kTwoHopSumThreads = Formats::kRaw && !Formats::f32 && !Kind::kBounded ? 640 : 512;

/// Dynamic shared memory: where warps sum | shares of the warps that send.
template <class Formats>
__host__ __device__ inline int64_t two_hop_sums_bytes(int warps) {
    return Formats::kRaw ? warps * kTermsBytes : 0;
}

template <class Kind, class Formats>
__host__ inline int64_t two_hop_combine_shared(const epcomm_cuda_two_hop_combine& all, int warps) {
    const int64_t sums = two_hop_sums_bytes<Formats>(warps);
    if constexpr (!Kind::kBounded) return sums;
    const int senders = combine_senders(warps);
    return sums + int64_t(senders) * SendShare::bytes(all.rail.chunking.num_nodes - 1,
                                                      all.call.num_blocks * senders);
}

template <class Kind, class Formats>
__global__ void __launch_bounds__(kTwoHopSumThreads<Kind, Formats>, 1)
    two_hop_combine_kernel(const __grid_constant__ epcomm_cuda_two_hop_combine all) {
    __shared__ Offer offers[EPCOMM_CUDA_MAX_LOCAL];
    extern __shared__ __align__(128) uint8_t shared_bytes[];
    const epcomm_cuda_combine& call = all.call;
    const epcomm_cuda_world& world = call.world;
    const uint64_t epoch = begin_call(world);
    if (epoch == 0) return;
    const bool timed = blockIdx.x == 0 && threadIdx.x == 0;
    if (timed) stamp(world, call.number, EPCOMM_CUDA_STAMP_START);
    Waiting what = {EPCOMM_OP_COMBINE, EPCOMM_PHASE_ANNOUNCE, epoch, fabric_failed<Kind>(all.rail)};
    if (blockIdx.x == 0 && !announce_to_world<Kind>(world, all.rail, call.announcement,
                                                    call.announcement.status, {}, what)) {
        return;
    }
    begin_block_role(world, EPCOMM_CUDA_ROLE_LISTEN);
    if (!wait_announced<true>(world, epoch, what, typename Kind::LookAround(all.rail))) return;
    end_block_role(world);
    const bool ahead = reduces_ahead(all, epoch);
    int verdict = ahead ? kNoVerdict : await_combine<Kind>(all, epoch);
    if (ahead || verdict == EPCOMM_CUDA_OK) {
        const bool extras = has_extras(call, find_offers(call, epoch, offers));
        what.phase = EPCOMM_PHASE_RETURN;
        SendShare* share = nullptr;
        if constexpr (Kind::kBounded) {
            const int warps = int(blockDim.x >> 5);
            share = deal_share(all.rail, shared_bytes + two_hop_sums_bytes<Formats>(warps),
                               combine_senders(warps));
        }
        const TwoHopSum sum = {all, offers, shared_bytes, share, what};
        constexpr bool kAlways = Formats::wire == kAnyWire;
        const bool ok = kAlways || extras ? combine_two_hop<Kind, Formats, true>(sum, &verdict)
                                          : combine_two_hop<Kind, Formats, kAlways>(sum, &verdict);
        if (!__syncthreads_and(ok || verdict > EPCOMM_CUDA_OK)) return;
    }
    if (verdict == kNoVerdict) return;
    delay(world, kDelayMoved);
    if (!is_last_block(world)) return;
    if (!settle<Kind>(world, all.rail, what)) return;
    if (verdict == EPCOMM_CUDA_OK) {
        collect_chunks<Kind>(all.rail, all.hops.sent, all.hops.received);
    }
    collect_decks(all.rail);
    note_moved(world, call.number);
    // After a refusal, too: the node's rows may have been read ahead.
    what.phase = EPCOMM_PHASE_RELEASE;
    what.between = 2;
    if (!meet_node(world, false, what)) return;
    end_call(world, verdict, epoch, call.number, false);
}

}  // namespace epcomm
