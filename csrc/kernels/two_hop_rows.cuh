// Rows that a warp of a two-hop dispatch has at hand together: what is known of them and what is
// stored beside their payload, one choice of one row a lane.
#pragma once

#include "choices.cuh"
#include "credits.cuh"
#include "feed.cuh"
#include "seats.cuh"

namespace epcomm {

/// What a warp's roles share.
struct TwoHop {
    const epcomm_cuda_two_hop_dispatch& all;
    Target* targets;
    uint32_t* area;    ///< this warp's, for a row's scales, when packing
    uint8_t* feed;     ///< this warp's, for rows on their way
    SendShare* share;  ///< this warp's, if it sends and staging is bounded
    Waiting what;
};

/// Ids and weights of the lanes' choices of `token`, each lane's own.
__device__ __forceinline__ Labels labels_of_tokens(const epcomm_cuda_dispatch& call,
                                                   const Seat& seat, int token) {
    Labels labels = {-1, 0.0f, call.world.rank, token};
    if (seat.taken) {
        const int64_t at = int64_t(token) * call.world.num_topk + seat.k;
        labels.expert = int(call.routes.topk_idx[at]);
        if (call.row.with_weights) labels.weight = call.topk_weights[at];
    }
    return labels;
}

__device__ __forceinline__ Labels labels_of_row(const Labels& all, int row, int num_topk) {
    return {of_row(all.expert, row, num_topk, -1), of_row(all.weight, row, num_topk, 0.0f),
            __shfl_sync(kWarp, all.source_rank, row * num_topk),
            __shfl_sync(kWarp, all.source_token, row * num_topk)};
}

/// Where a row comes from and goes to, by lane.
struct Move {
    const uint8_t* rows;    ///< of the one source, if it is packed on the way
    const uint32_t* words;  ///< its scales, if they are not made on the way
    unsigned lanes;
    uint8_t* to;
    uint8_t* scales_to;
};

__device__ __forceinline__ const uint8_t* row_of_token(const epcomm_cuda_dispatch& call,
                                                       int token) {
    return static_cast<const uint8_t*>(call.x) + int64_t(token) * call.row_in_bytes;
}

/// The row of `token` as it enters the first hop.
__device__ __forceinline__ Move move_of_token(const epcomm_cuda_dispatch& call, int token) {
    Move move = {};
    move.rows = row_of_token(call, token);
    move.words =
        static_cast<const uint32_t*>(call.scales) + int64_t(token) * (call.row.scale_bytes / 4);
    return move;
}

/// Store the next row that a feed brings, and its scales. The whole warp.
template <class Source>
__device__ __forceinline__ void move_with_scales(const Move& move, int scale_words,
                                                 RowFeed<Source>& feed) {
    uint32_t held[kHeldWords];
    load_words(held, move.words, scale_words);
    move_fed_row(feed, move.lanes, move.to);
    store_words(held, move.words, scale_words, move.lanes, move.scales_to);
}

/// The same for a row of BF16 or float32, which is packed on its way. `area`: this warp's in shared
/// memory, for the scales.
template <bool f32>
__device__ __forceinline__ void pack_with_scales(const Move& move, const epcomm_cuda_dispatch& call,
                                                 uint32_t* area) {
    const bool power_of_two = call.announcement.format == EPCOMM_FORMAT_FP8_UE8M0;
    const int scale_words = call.row.scale_bytes / 4;
    pack_and_move_row<f32>(move.rows, call.row_in_bytes / (f32 ? 4 : 2), power_of_two, move.lanes,
                           move.to, area);
    uint32_t held[kHeldWords];
    load_words(held, area, scale_words);
    store_words(held, area, scale_words, move.lanes, move.scales_to);
    __syncwarp();
}

/// Fill in where the rows of a list go.
__device__ __forceinline__ void aim(const epcomm_cuda_dispatch& call, const Target* targets,
                                    const CopyList& copies, Move* move) {
    move->lanes = copies.rows;
    if (copies.local < 0) return;
    const Target& target = targets[copies.local];
    move->to = target.rows + int64_t(copies.row) * call.row.row_bytes;
    move->scales_to = target.scales + int64_t(copies.row) * call.row.scale_bytes;
}

/// A token with a record has fewer than 32 choices in this node, and their lists begin at lane 0.
constexpr int kRecordLane = 31;

/// Fill in that a row also goes into a record, whose scales begin at byte `scales`.
__device__ __forceinline__ void aim_at_record(uint8_t* record, int scales, Move* move) {
    move->lanes |= 1u << kRecordLane;
    if (lane_id() != kRecordLane) return;
    move->to = record;
    move->scales_to = record + scales;
}

/// Everything of records for another node but payload and scales; `index`: of the choices' rows.
__device__ __forceinline__ void write_record_labels(const TwoHop& hop, const Seat& seat, int node,
                                                    uint8_t* record, const Labels& labels,
                                                    int index) {
    const epcomm_cuda_dispatch& call = hop.all.call;
    const epcomm_record& layout = hop.all.record;
    const int K = call.world.num_topk;
    const int per_rank = call.world.num_experts / call.world.num_ranks;
    unsigned long long mine = 0, mask = 0;
    if (seat.taken) {
        int row = -1;
        if (labels.expert >= 0) {
            const epcomm_cuda_place place = hop.all.rail.places[labels.expert / per_rank];
            if (place.node == node) {
                row = index;
                mine = 1ull << place.local;
            }
        }
        reinterpret_cast<int32_t*>(record + layout.expert)[seat.k] = labels.expert;
        reinterpret_cast<int32_t*>(record + layout.row)[seat.k] = row;
        reinterpret_cast<float*>(record + layout.weight)[seat.k] = labels.weight;
    }
    for (int j = 0; j < K; ++j) mask |= __shfl_sync(kWarp, mine, lane_of_choice(K, j));
    if (seat.taken && seat.k == 0) {
        auto* meta = reinterpret_cast<epcomm_record_meta*>(record + layout.meta);
        meta->rank_mask = mask;
        meta->source_rank = labels.source_rank;
        meta->source_token = labels.source_token;
    }
}

/// The rows in this node of the choices of a record from `node`: base + the index that it carries.
__device__ __forceinline__ int row_of_choice(const epcomm_cuda_two_hop_dispatch& all, int node,
                                             int expert, int index) {
    if (index < 0) return -1;
    const int per_rank = all.call.world.num_experts / all.call.world.num_ranks;
    const int local = all.rail.places[expert / per_rank].local;
    const int key =
        all.call.row.layout == EPCOMM_LAYOUT_EXPERT ? local * per_rank + expert % per_rank : local;
    return all.hops.base[node * all.hops.num_keys + key] + index;
}

/// The choices of received records that are held in this node, as lists: lane (record, k) has the
/// expert of choice k and the row that it got, or -1, and gets entry k of the record's list.
__device__ __forceinline__ Copy lists_of_records(const epcomm_cuda_two_hop_dispatch& all,
                                                 const Seat& seat, int expert, int row) {
    const int K = all.call.world.num_topk;
    const int per_rank = all.call.world.num_experts / all.call.world.num_ranks;
    const int local = row >= 0 ? all.rail.places[expert / per_rank].local : -1;
    int at = 0;
    for (int j = 0; j < K; ++j) {
        const int other = __shfl_sync(kWarp, local, lane_of_choice(K, j));
        at += other >= 0 && (other < local || (other == local && j < seat.k));
    }
    Copy copy = {-1, -1, -1};
    for (int j = 0; j < K; ++j) {
        const int lane = lane_of_choice(K, j);
        const int other = __shfl_sync(kWarp, local, lane), place = __shfl_sync(kWarp, at, lane);
        const int other_row = __shfl_sync(kWarp, row, lane);
        if (other >= 0 && place == seat.k) copy = {other, j, other_row};
    }
    return copy;
}

}  // namespace epcomm
