// First call among nodes, before data: count, announce, place, wait for all announcements.
//
// Which of this rank's copies a copy is does not depend on the others': all are numbered while the
// announcements are under way, and once these are in, a row is a base and a number.
#pragma once

#include "bases.cuh"
#include "choices.cuh"
#include "finish.cuh"
#include "prepared.cuh"
#include "relay.cuh"
#include "timeline.cuh"
#include "two_hop_bases.cuh"

namespace epcomm {

/// Warps of a block, where their counts fit into shared memory.
constexpr int kLayoutWarps = 16;

/// Shared memory of the kernel, in ints. `wide`: bins of the layout's key, `other`: of the other.
struct TwoHopLayoutShared {
    int* warp_bins;   ///< [warps][N + wide]
    int* other_bins;  ///< [other]
    int* counts;      ///< [N + R + E], block 0
    int* own_base;    ///< [keys]
    int* rows;        ///< [R]
    int wide;
    int other;

    __host__ __device__ static int64_t ints(const epcomm_cuda_two_hop_layout& all, int warps) {
        const int64_t N = all.call.world.num_nodes, R = all.call.world.num_ranks;
        const int64_t E = all.call.world.num_experts;
        const bool by_expert = all.call.row.layout == EPCOMM_LAYOUT_EXPERT;
        return warps * (N + (by_expert ? E : R)) + (by_expert ? R : E) + N + R + E +
               all.hops.num_keys + R;
    }

    __device__ TwoHopLayoutShared(int* at, const epcomm_cuda_two_hop_layout& all, int warps) {
        const epcomm_cuda_world& world = all.call.world;
        const bool by_expert = all.call.row.layout == EPCOMM_LAYOUT_EXPERT;
        wide = by_expert ? world.num_experts : world.num_ranks;
        other = by_expert ? world.num_ranks : world.num_experts;
        warp_bins = at;
        other_bins = warp_bins + warps * (world.num_nodes + wide);
        counts = other_bins + other;
        own_base = counts + world.num_nodes + world.num_ranks + world.num_experts;
        rows = own_base + all.hops.num_keys;
    }
};

/// Bins in the order of an announcement: nodes, ranks, experts.
__device__ __forceinline__ int num_bins(const epcomm_cuda_world& world) {
    return world.num_nodes + world.num_ranks + world.num_experts;
}

/// Role: count this block's choices and publish the sums to the rank's other blocks.
__device__ inline void count_two_hop_block(const epcomm_cuda_two_hop_layout& all,
                                           const TwoHopLayoutShared& shared) {
    const epcomm_cuda_world& world = all.call.world;
    const int N = world.num_nodes, warps = int(blockDim.x >> 5), each = N + shared.wide;
    const bool by_expert = all.call.row.layout == EPCOMM_LAYOUT_EXPERT;
    for (int i = int(threadIdx.x); i < warps * each + shared.other; i += int(blockDim.x)) {
        shared.warp_bins[i] = 0;  // the other bins lie right behind
    }
    __syncthreads();
    count_choices(all, shared.warp_bins + warp_id() * each, shared.other_bins);
    __syncthreads();
    int32_t* sums = world.block_bins + int64_t(blockIdx.x) * num_bins(world);
    for (int i = int(threadIdx.x); i < num_bins(world); i += int(blockDim.x)) {
        const bool is_rank = i >= N && i < N + world.num_ranks;
        if (i < N || is_rank != by_expert) {
            const int bin = i < N || is_rank ? i : i - world.num_ranks;
            sums[i] = column_sum(shared.warp_bins + bin, each, warps);
        } else {
            sums[i] = shared.other_bins[is_rank ? i - N : i - N - world.num_ranks];
        }
    }
}

/// Role (block 0): sum all blocks' counts and announce them.
template <class Kind>
__device__ inline bool announce_two_hop(const epcomm_cuda_two_hop_layout& all,
                                        const TwoHopLayoutShared& shared, const Waiting& what) {
    const epcomm_cuda_world& world = all.call.world;
    const int bins = num_bins(world);
    for (int i = int(threadIdx.x); i < bins; i += int(blockDim.x)) {
        shared.counts[i] = column_sum(world.block_bins + i, bins, int(gridDim.x));
    }
    __syncthreads();
    const bool bad = own_control(world)->bad_choice != INT32_MAX;
    const int status = bad ? int(EPCOMM_STATUS_REFUSED) : all.call.announcement.status;
    return announce_to_world<Kind>(world, all.rail, all.call.announcement, status,
                                   {shared.counts, 0, bins}, what);
}

/// Turn the per-warp counts into the first number of every warp's share, in place.
__device__ inline void scan_two_hop_warps(const epcomm_cuda_two_hop_layout& all,
                                          const TwoHopLayoutShared& shared) {
    const epcomm_cuda_world& world = all.call.world;
    const int N = world.num_nodes, each = N + shared.wide;
    const bool by_expert = all.call.row.layout == EPCOMM_LAYOUT_EXPERT;
    for (int i = int(threadIdx.x); i < each; i += int(blockDim.x)) {
        const int bin = i < N || !by_expert ? i : i + world.num_ranks;
        const int next = column_sum(world.block_bins + bin, num_bins(world), int(blockIdx.x));
        scan_column(shared.warp_bins + i, each, int(blockDim.x >> 5), next);
    }
}

/// Role: the first rows of this rail's sources at this node; block 0 leaves them in the handle.
__device__ inline void find_two_hop_bases(const epcomm_cuda_two_hop_layout& all,
                                          const TwoHopLayoutShared& shared, uint64_t epoch) {
    const epcomm_cuda_layout& call = all.call;
    const bool leads = blockIdx.x == 0;
    const TwoHopBases to = {leads,
                            shared.rows,
                            shared.own_base,
                            all.hops.base,
                            call.routes.group_start,
                            call.routes.group_count,
                            all.hops.num_keys};
    if (call.row.layout == EPCOMM_LAYOUT_EXPERT) {
        two_hop_bases_by_expert(call.world, all.rail, call.announcement.alignment, epoch, to);
    } else {
        two_hop_bases_by_rank(call.world, all.rail, epoch, to);
        if (leads) count_local_experts(call.world, epoch, call.routes.group_count);
    }
    if (leads) count_records(call.world, all.rail, epoch, all.hops.sent, all.hops.received);
}

template <class Kind>
__global__ void __launch_bounds__(32 * kLayoutWarps, 1)
    two_hop_layout_kernel(const __grid_constant__ epcomm_cuda_two_hop_layout all) {
    extern __shared__ __align__(128) uint8_t shared_bytes[];
    const epcomm_cuda_layout& call = all.call;
    const epcomm_cuda_world& world = call.world;
    const TwoHopLayoutShared shared(reinterpret_cast<int*>(shared_bytes), all,
                                    int(blockDim.x >> 5));
    const uint64_t epoch = begin_call(world);
    if (epoch == 0) return;
    const Waiting what = {call.announcement.op, EPCOMM_PHASE_ANNOUNCE, epoch,
                          fabric_failed<Kind>(all.rail)};
    const bool leads = blockIdx.x == 0, timed = leads && threadIdx.x == 0;

    if (timed) stamp(world, call.number, EPCOMM_CUDA_STAMP_START);
    begin_block_role(world, EPCOMM_CUDA_ROLE_COUNT);
    count_two_hop_block(all, shared);
    end_block_role(world);
    delay(world, kDelayCounted);
    begin_block_role(world, EPCOMM_CUDA_ROLE_MEET);
    bool ok = meet(world, what);
    end_block_role(world);
    if (ok && leads) ok = announce_two_hop<Kind>(all, shared, what);
    if (timed) stamp(world, call.number, EPCOMM_CUDA_STAMP_COUNTED);
    if (!ok) return;
    // Block 0 numbers before it hands on what the rail peers announce. Where that is here already,
    // this rank is late, and would not be done sooner by numbering behind it.
    begin_role(world, EPCOMM_CUDA_ROLE_PLACE);
    scan_two_hop_warps(all, shared);
    __syncthreads();
    number_choices(all, shared.warp_bins + warp_id() * (world.num_nodes + shared.wide));
    end_role(world);
    begin_block_role(world, EPCOMM_CUDA_ROLE_LISTEN);
    if (leads) ok = relay<Kind>(world, all.rail, what);
    ok = ok && wait_announced(world, epoch, what, typename Kind::LookAround(all.rail));
    end_block_role(world);
    if (timed) stamp(world, call.number, EPCOMM_CUDA_STAMP_ANNOUNCED);
    if (!ok) return;
    delay(world, kDelayAnnounced);
    begin_role(world, EPCOMM_CUDA_ROLE_PLACE);
    find_two_hop_bases(all, shared, epoch);
    __syncthreads();
    if (leads) {
        for (int r = int(threadIdx.x); r < world.num_ranks; r += int(blockDim.x)) {
            call.routes.rows[r] = shared.rows[r];
        }
        const int verdict = judge_all(world, call.announcement, call.row, shared.rows, epoch);
        report_prepared(call, verdict, shared.rows, epoch);
    }
    add_bases(all, shared.own_base);
    end_role(world);
}

}  // namespace epcomm
