// Layout, last: what the host learns about a first dispatch before its data moves.
#pragma once

#include "finish.cuh"

namespace epcomm {

/// Tell the host the verdict and this rank's row counts. The whole block 0.
template <class Call>
__device__ inline void report_prepared(const Call& call, int verdict, const int* rows,
                                       uint64_t epoch) {
    const epcomm_cuda_world& world = call.world;
    auto* tokens_per_expert = reinterpret_cast<int32_t*>(world.report + 1);
    const int per_rank = world.num_experts / world.num_ranks;
    for (int e = int(threadIdx.x); e < per_rank; e += int(blockDim.x)) {
        tokens_per_expert[e] = call.routes.group_count[e];
    }
    // The barrier orders the block's stores before the release, which is cumulative: a store to the
    // host's memory takes a microsecond to be fenced.
    __syncthreads();
    if (threadIdx.x == 0) {
        const int bad = own_control(world)->bad_choice;
        *call.routes.verdict = verdict;
        world.report->rows = rows[world.rank];
        int largest = 0;
        for (int r = 0; r < world.num_ranks; ++r) largest = max(largest, rows[r]);
        world.report->max_rows = largest;
        world.report->bad_choice = bad == INT32_MAX ? -1 : bad;
        own_control(world)->bad_choice = INT32_MAX;
        report_verdict(world, verdict, epoch, call.number);
    }
}

}  // namespace epcomm
