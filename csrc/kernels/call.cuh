// How a call begins and ends on every rank alike, whatever its kernel moves.
#pragma once

#include "deal.cuh"
#include "finish.cuh"
#include "timeline.cuh"

namespace epcomm {

/// Announce a call whose counts are known to the node (block 0), and wait for the others'. The
/// whole block; false: gave up.
template <class Call>
__device__ inline bool announce_known(const Call& call, const Waiting& what) {
    const epcomm_cuda_world& world = call.world;
    if (blockIdx.x == 0) {
        delay(world, kDelayAnnounce);
        begin_block_role(world, EPCOMM_CUDA_ROLE_ANNOUNCE);
        announce(world, call.announcement, call.announcement.status, {}, what.epoch);
        end_block_role(world);
    }
    begin_block_role(world, EPCOMM_CUDA_ROLE_LISTEN);
    if (!wait_announced(world, what.epoch, what)) return false;
    end_block_role(world);
    if (blockIdx.x == 0 && threadIdx.x == 0) stamp(world, call.number, EPCOMM_CUDA_STAMP_ANNOUNCED);
    delay(world, kDelayAnnounced);
    return true;
}

/// The verdict on a combine, the same on all ranks. The whole block.
__device__ inline int judge_combine(const epcomm_cuda_combine& call, uint64_t epoch) {
    const epcomm_cuda_row no_row = {};
    int verdict = judge_all(call.world, call.announcement, no_row, nullptr, epoch);
    if (verdict == EPCOMM_CUDA_OK) verdict = judge_routes(call.routes);
    // The host waits for it only where it has no window to offer.
    const bool awaited = call.announcement.window_bytes == 0;
    if (awaited && blockIdx.x == 0 && threadIdx.x == 0) {
        report_verdict(call.world, verdict, epoch, call.number);
    }
    return verdict;
}

/// All blocks have done their work. The whole last block.
__device__ inline void note_moved(const epcomm_cuda_world& world, uint64_t number) {
    if (threadIdx.x != 0) return;
    collect_deck(world);
    stamp(world, number, EPCOMM_CUDA_STAMP_MOVED);
}

/// Tell the node's ranks that this one's rows have arrived, or that theirs have been read, and wait
/// until all have said so. The whole last block; false: gave up.
__device__ inline bool meet_node(const epcomm_cuda_world& world, bool arrived,
                                 const Waiting& what) {
    const epcomm_cuda_control* own = own_control(world);
    delay(world, kDelaySignal);
    begin_block_role(world, EPCOMM_CUDA_ROLE_ARRIVE);
    signal_node(world, arrived, what.epoch);
    if (!wait_node(world, arrived ? own->arrived : own->released, what.epoch, what)) return false;
    end_block_role(world);
    return true;
}

/// The call is over, moved or refused. `own_choices`: it looked at this rank's, of which a bad one
/// may be the cause. The whole last block.
__device__ inline void end_call(const epcomm_cuda_world& world, int verdict, uint64_t epoch,
                                uint64_t number, bool own_choices) {
    delay(world, kDelayFinish);
    if (verdict != EPCOMM_CUDA_OK) {
        report_refusal(world, verdict, epoch, own_choices ? world.report->bad_choice : -1);
    }
    if (threadIdx.x == 0) {
        finish_epoch(world, epoch);
        stamp(world, number, EPCOMM_CUDA_STAMP_END);
    }
}

}  // namespace epcomm
