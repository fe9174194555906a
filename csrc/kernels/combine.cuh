// Combine: announce that this rank's rows are ready, wait for the peers', pull and sum, then tell
// the peers that their rows have been read.
#pragma once

#include "call.cuh"
#include "pull.cuh"
#include "return_weights.cuh"

namespace epcomm {

template <bool many>
constexpr int kMaxThreads = many ? 512 : 640;

/// What a column has room for in a call.
inline PullPlan plan_combine(const epcomm_cuda_combine& call) {
    return {call.routes.max_dests < kPullCopies ? call.routes.max_dests : kPullCopies};
}

template <bool f32, bool many>
__global__ void __launch_bounds__(kMaxThreads<many>, 1)
    combine_kernel(const __grid_constant__ epcomm_cuda_combine call,
                   const __grid_constant__ PullPlan plan) {
    extern __shared__ __align__(128) uint8_t shared_bytes[];
    __shared__ Offer offers[EPCOMM_CUDA_MAX_LOCAL];
    const epcomm_cuda_world& world = call.world;
    const uint64_t epoch = begin_call(world);
    if (epoch == 0) return;
    if (blockIdx.x == 0 && threadIdx.x == 0) stamp(world, call.number, EPCOMM_CUDA_STAMP_START);
    Waiting what = {EPCOMM_OP_COMBINE, EPCOMM_PHASE_ANNOUNCE, epoch};
    if (!announce_known(call, what)) return;
    const int verdict = judge_combine(call, epoch);
    if (verdict == EPCOMM_CUDA_OK) {
        const bool extras = has_extras(call, find_offers(call, epoch, offers));
        begin_role(world, EPCOMM_CUDA_ROLE_REDUCE);
        if (extras) {
            pull_tokens<f32, many, true>(call, offers, plan, shared_bytes);
        } else {
            pull_tokens<f32, many, false>(call, offers, plan, shared_bytes);
        }
        if (call.topk_weights != nullptr) return_weights(call, offers);
        end_role(world);
    }
    delay(world, kDelayMoved);
    if (!is_last_block(world)) return;
    note_moved(world, call.number);
    // All ranks come to the same verdict, so after a refusal nobody waits.
    if (verdict == EPCOMM_CUDA_OK) {
        what.phase = EPCOMM_PHASE_RELEASE;
        if (!meet_node(world, false, what)) return;
    }
    call_next();
    end_call(world, verdict, epoch, call.number, false);
}

}  // namespace epcomm
