// Dispatch among nodes, data. Every warp writes records for other nodes, then stores rows in its
// own node, then stores the rows of records that arrive. Sends come first and forwarding last, so
// nobody waits while others need what it holds, and no SMs are set aside for a role. Where staging
// is bounded, some warps of each block send first and others forward first.
#pragma once

#include "call.cuh"
#include "credits.cuh"
#include "labels.cuh"
#include "move.cuh"
#include "pad.cuh"

namespace epcomm {

constexpr int kTwoHopThreads = 512;

/// What a warp's roles share.
struct TwoHop {
    const epcomm_cuda_two_hop_dispatch& all;
    const Target* targets;
    uint32_t* area;    ///< this warp's, for a row's scales, when packing
    SendShare* share;  ///< this warp's, if it sends and staging is bounded
    Waiting what;
};

__device__ __forceinline__ Labels labels_of_token(const epcomm_cuda_dispatch& call, int token) {
    const int K = call.world.num_topk, lane = lane_id();
    Labels labels = {-1, 0.0f, call.world.rank, token};
    if (lane < K) {
        labels.expert = int(call.routes.topk_idx[int64_t(token) * K + lane]);
        if (call.row.with_weights) labels.weight = call.topk_weights[int64_t(token) * K + lane];
    }
    return labels;
}

/// The row of `token` as it enters the first hop.
__device__ __forceinline__ Move move_of_token(const epcomm_cuda_dispatch& call, int token) {
    Move move = {};
    move.rows = static_cast<const uint8_t*>(call.x) + int64_t(token) * call.row_in_bytes;
    move.words =
        static_cast<const uint32_t*>(call.scales) + int64_t(token) * (call.row.scale_bytes / 4);
    return move;
}

/// Everything of a record but payload and scales. The whole warp.
__device__ __forceinline__ void write_record_labels(const TwoHop& hop, uint8_t* record, int node,
                                                    const Labels& labels) {
    const epcomm_cuda_dispatch& call = hop.all.call;
    const epcomm_record& layout = hop.all.record;
    const int K = call.world.num_topk, lane = lane_id();
    const int per_rank = call.world.num_experts / call.world.num_ranks;
    unsigned long long mask = 0;
    if (lane < K) {
        int index = -1;
        if (labels.expert >= 0) {
            const epcomm_cuda_place place = hop.all.rail.places[labels.expert / per_rank];
            if (place.node == node) {
                index = hop.all.hops.index[int64_t(labels.source_token) * K + lane];
                mask = 1ull << place.local;
            }
        }
        reinterpret_cast<int32_t*>(record + layout.expert)[lane] = labels.expert;
        reinterpret_cast<int32_t*>(record + layout.row)[lane] = index;
        reinterpret_cast<float*>(record + layout.weight)[lane] = labels.weight;
    }
    for (int step = 16; step > 0; step /= 2) mask |= __shfl_xor_sync(kWarp, mask, step);
    if (lane == 0) {
        auto* meta = reinterpret_cast<epcomm_record_meta*>(record + layout.meta);
        meta->rank_mask = mask;
        meta->source_rank = labels.source_rank;
        meta->source_token = labels.source_token;
    }
}

/// Write a record for another node; the warp that completes a chunk sends it.
template <class Kind, int packing>
__device__ __forceinline__ bool send_record(const TwoHop& hop, int node, int slot) {
    const epcomm_cuda_dispatch& call = hop.all.call;
    const epcomm_cuda_rail& rail = hop.all.rail;
    const epcomm_chunking& chunking = rail.chunking;
    const epcomm_record& layout = hop.all.record;
    const bool power_of_two = call.announcement.format == EPCOMM_FORMAT_FP8_UE8M0;
    const int peer = epcomm_peer_index(chunking.node, node);
    const int token = hop.all.hops.token_of[int64_t(peer) * chunking.max_records + slot];
    uint8_t* record = rail.send + staging_offset<Kind>(chunking, node, slot, layout.bytes);
    delay_row(call.world, token);
    Move move = move_of_token(call, token);
    move.lanes = 1;
    move.to = record;
    move.scales_to = record + layout.scales;
    write_record_labels(hop, record, node, labels_of_token(call, token));
    move_with_scales<packing>(move, call.row_in_bytes, call.row.scale_bytes / 4, power_of_two,
                              hop.area);
    count_item(call.world);
    return written<Kind>(call.world, rail, node, slot, hop.all.hops.sent[peer], layout.bytes,
                         hop.what);
}

/// Warps of a block that send first where staging is bounded.
__host__ __device__ inline int dispatch_senders(int warps) { return warps < 8 ? 1 : warps / 4; }

/// Role: write the records for other nodes.
template <class Kind, int packing>
__device__ inline bool send_records(const TwoHop& hop) {
    const auto send = [&](int node, int slot) {
        return send_record<Kind, packing>(hop, node, slot);
    };
    const epcomm_cuda_world& world = hop.all.call.world;
    const epcomm_cuda_rail& rail = hop.all.rail;
    const int32_t* sent = hop.all.hops.sent;
    bool ok;
    begin_role(world, EPCOMM_CUDA_ROLE_PACK);
    if constexpr (Kind::kBounded) {
        ok = send_as_credited<Kind>(world, rail, sent, hop.share, hop.what, send);
    } else {
        ok = send_in_turn(rail, sent, send);
    }
    end_role(world);
    return ok;
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

/// Role: store the rows of this rank's tokens in its own node.
template <class Kind, int packing>
__device__ inline void store_near(const TwoHop& hop) {
    const epcomm_cuda_dispatch& call = hop.all.call;
    const int K = call.world.num_topk;
    const bool power_of_two = call.announcement.format == EPCOMM_FORMAT_FP8_UE8M0;
    uint32_t* dealt = &own_control(call.world)->dealt;
    auto dealer = dealer_of<Kind>(dealt);
    begin_role(call.world, EPCOMM_CUDA_ROLE_STORE);
    while (true) {
        int token = lane_id() == 0 ? dealer.take(dealt, call.routes.num_tokens) : 0;
        token = __shfl_sync(kWarp, token, 0);
        if (token < 0) break;
        const CopyList copies =
            load_list(call.routes.dests + int64_t(token) * K, K, call.row.layout);
        if (copies.count == 0) continue;
        count_item(call.world);
        Move move = move_of_token(call, token);
        aim(call, hop.targets, copies, &move);
        store_row_labels(call, hop.targets, copies, labels_of_token(call, token));
        move_with_scales<packing>(move, call.row_in_bytes, call.row.scale_bytes / 4, power_of_two,
                                  hop.area);
    }
    end_role(call.world);
}

/// The choices of a received record that are held in this node, as a list. Lane k has choice k's
/// expert and the row it got, or -1. The whole warp.
__device__ __forceinline__ CopyList list_of_record(const epcomm_cuda_two_hop_dispatch& all,
                                                   int expert, int row) {
    const int K = all.call.world.num_topk, lane = lane_id();
    const int per_rank = all.call.world.num_experts / all.call.world.num_ranks;
    const int local = row >= 0 ? all.rail.places[expert / per_rank].local : -1;
    int at = 0, count = 0;
    for (int j = 0; j < K; ++j) {
        const int other = __shfl_sync(kWarp, local, j);
        count += other >= 0;
        at += other >= 0 && (other < local || (other == local && j < lane));
    }
    // Lane i looks for the choice whose place is i.
    CopyList copies = {count, -1, -1, -1, 0};
    for (int j = 0; j < K; ++j) {
        const int other = __shfl_sync(kWarp, local, j), place = __shfl_sync(kWarp, at, j);
        const int other_row = __shfl_sync(kWarp, row, j);
        if (other >= 0 && place == lane) {
            copies.local = other;
            copies.choice = j;
            copies.row = other_row;
        }
    }
    copies.rows = rows_of_list(copies.local, all.call.row.layout);
    return copies;
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

/// Store one record's rows in this node; leaves the list of them for the way back.
template <class Kind>
__device__ __forceinline__ void forward_record(const TwoHop& hop, int node, int slot) {
    const epcomm_cuda_two_hop_dispatch& all = hop.all;
    const epcomm_cuda_dispatch& call = all.call;
    const epcomm_chunking& chunking = all.rail.chunking;
    const epcomm_record& layout = all.record;
    const int K = call.world.num_topk, lane = lane_id();
    const uint8_t* record =
        all.rail.receive + staging_offset<Kind>(chunking, node, slot, layout.bytes);
    const auto* meta = reinterpret_cast<const epcomm_record_meta*>(record + layout.meta);
    Labels labels = {-1, 0.0f, meta->source_rank, meta->source_token};
    int index = -1;
    if (lane < K) {
        labels.expert = reinterpret_cast<const int32_t*>(record + layout.expert)[lane];
        labels.weight = reinterpret_cast<const float*>(record + layout.weight)[lane];
        index = reinterpret_cast<const int32_t*>(record + layout.row)[lane];
    }
    const int row = row_of_choice(all, node, labels.expert, index);
    const CopyList copies = list_of_record(all, labels.expert, row);
    if (all.forward_list && lane < K) {
        const int64_t place = epcomm_peer_index(chunking.node, node);
        all.hops.forwarded[(place * chunking.max_records + slot) * K + lane] = {
            int16_t(copies.local), int16_t(copies.choice), copies.row};
    }
    Move move = {};
    move.rows = record;
    move.words = reinterpret_cast<const uint32_t*>(record + layout.scales);
    aim(call, hop.targets, copies, &move);
    store_row_labels(call, hop.targets, copies, labels);
    move_with_scales<0>(move, call.row.row_bytes, call.row.scale_bytes / 4, false, nullptr);
}

/// Role: forward what arrives, first chunks of all peers first.
template <class Kind>
__device__ inline bool forward_records(const TwoHop& hop) {
    const epcomm_cuda_world& world = hop.all.call.world;
    const epcomm_cuda_rail& rail = hop.all.rail;
    const epcomm_chunking& chunking = rail.chunking;
    const int32_t* received = hop.all.hops.received;
    const int items = epcomm_num_items(&chunking, most_records(received, chunking.num_nodes - 1));
    auto dealer = dealer_of<Kind>(rail.dealt + 1);
    Arrivals arrivals;
    begin_role(world, EPCOMM_CUDA_ROLE_FORWARD);
    while (true) {
        int item = lane_id() == 0 ? dealer.take(rail.dealt + 1, items) : 0;
        item = __shfl_sync(kWarp, item, 0);
        if (item < 0) break;
        const epcomm_chunk_item found = epcomm_item_of(&chunking, item);
        const int node = epcomm_receive_node(&chunking, found.step);
        const int records = received[epcomm_peer_index(chunking.node, node)];
        if (found.slot >= records) continue;
        if (!arrivals.wait<Kind>(world, rail, node, found.slot, hop.what)) return false;
        delay_row(world, item);
        count_item(world);
        forward_record<Kind>(hop, node, found.slot);
        if constexpr (Kind::kBounded) {
            __syncwarp();
            const bool ok = lane_id() != 0 ||
                            read_record<Kind>(world, rail, node, found.slot, records, hop.what);
            if (!__all_sync(kWarp, ok)) return false;
        }
    }
    end_role(world);
    return true;
}

/// Role: all of them, one after the other; or first what the others wait for, then what is left.
/// A quarter of the warps send and a quarter store in their own node first, where there are enough.
template <class Kind, int packing>
__device__ inline bool move_records(const TwoHop& hop) {
    if constexpr (!Kind::kBounded) {
        if (!send_records<Kind, packing>(hop)) return false;
        store_near<Kind, packing>(hop);
        return forward_records<Kind>(hop);
    } else {
        const int warps = int(blockDim.x >> 5), senders = dispatch_senders(warps);
        if (warp_id() < senders && !send_records<Kind, packing>(hop)) return false;
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

/// Shared memory: targets | scales areas | shares of the warps that send.
__host__ __device__ inline int64_t two_hop_dispatch_areas(const epcomm_cuda_dispatch& call,
                                                          int packing) {
    return int64_t(call.world.num_local) * sizeof(Target) +
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
    auto* targets = reinterpret_cast<Target*>(shared_bytes);
    auto* area = reinterpret_cast<uint32_t*>(shared_bytes + world.num_local * sizeof(Target) +
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
        !announce_world<Kind>(world, all.rail, call.announcement, call.announcement.status, {},
                              what)) {
        return;
    }
    begin_block_role(world, EPCOMM_CUDA_ROLE_LISTEN);
    if (!wait_announced(world, epoch, what, typename Kind::LookAround(all.rail))) return;
    end_block_role(world);
    if (timed && call.announce) stamp(world, call.number, EPCOMM_CUDA_STAMP_ANNOUNCED);
    delay(world, kDelayAnnounced);
    int verdict = judge_all(world, call.announcement, call.row, call.routes.rows, epoch);
    if (call.announce && verdict == EPCOMM_CUDA_OK) verdict = judge_routes(call.routes);
    if (call.announce && timed) report_verdict(world, verdict, epoch, call.number);
    if (verdict == EPCOMM_CUDA_OK) {
        find_targets(call, epoch, targets);
        __syncthreads();
        clear_unused(call, targets[world.local_rank]);
        what.phase = EPCOMM_PHASE_DATA;
        const TwoHop hop = {all, targets, area, share, what};
        if (!__syncthreads_and(move_records<Kind, packing>(hop))) return;
    }
    delay(world, kDelayMoved);
    if (!is_last_block(world)) return;
    if (!settle<Kind>(world, all.rail, what)) return;
    if (verdict == EPCOMM_CUDA_OK) {
        collect_chunks<Kind>(all.rail, all.hops.received, all.hops.sent);
    }
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
