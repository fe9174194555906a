// Combine: announce that this rank's rows are ready, wait for the peers', pull and sum, then tell
// the peers that their rows have been read.
#include "finish.cuh"
#include "launch.cuh"
#include "reduce.cuh"
#include "return_weights.cuh"

namespace epcomm {

/// Fill `offers[R]`; true if any rank's rows carry weights. The whole block.
__device__ inline bool find_offers(const epcomm_cuda_combine& call, uint64_t epoch,
                                   Offer* offers) {
    const epcomm_cuda_world& world = call.world;
    bool weighted = false;
    for (int r = int(threadIdx.x); r < world.num_ranks; r += int(blockDim.x)) {
        const epcomm_announcement* theirs = announcement_of(world, world.rank, r, epoch);
        const uint8_t* window =
            world.windows[int64_t(r) * world.num_windows + theirs->window_serial];
        offers[r].rows = window + theirs->rows_offset;
        offers[r].weights =
            theirs->row_weights
                ? reinterpret_cast<const float*>(window + theirs->weights_offset)
                : nullptr;
        offers[r].topk_weights = reinterpret_cast<const float*>(window + theirs->topk_offset);
        weighted = weighted || theirs->row_weights;
    }
    return __syncthreads_or(weighted);
}

/// Most threads of a block: more registers a thread where rows are float32.
template <bool f32>
constexpr int kThreads = f32 ? 512 : 768;

template <bool f32>
__global__ void __launch_bounds__(kThreads<f32>, 1)
    combine_kernel(const __grid_constant__ epcomm_cuda_combine call) {
    __shared__ Offer offers[EPCOMM_CUDA_MAX_RANKS];
    const epcomm_cuda_world& world = call.world;
    const uint64_t epoch = load_relaxed(&own_control(world)->epoch.value) + 1;
    if (blockIdx.x == 0) {
        announce(world, call.announcement, call.announcement.status, nullptr, epoch);
    }
    Waiting what = {EPCOMM_OP_COMBINE, EPCOMM_PHASE_ANNOUNCE, epoch};
    if (!wait_all_ranks(world, own_control(world)->announced, epoch, what)) return;
    const epcomm_cuda_row no_row = {};
    const int verdict = judge_all(world, call.announcement, no_row, nullptr, epoch);
    if (verdict == EPCOMM_CUDA_OK) {
        if (find_offers(call, epoch, offers)) {
            sum_tokens<f32, true>(call, offers);
        } else {
            sum_tokens<f32, false>(call, offers);
        }
        if (call.topk_weights != nullptr) return_weights(call, offers);
    }
    if (!is_last_block(world)) return;
    signal_all(world, false, epoch);
    what.phase = EPCOMM_PHASE_RELEASE;
    if (!wait_all_ranks(world, own_control(world)->released, epoch, what)) return;
    if (threadIdx.x == 0) {
        if (verdict != EPCOMM_CUDA_OK) report_verdict(world, verdict, what.op, epoch);
        finish_epoch(world, epoch);
        store_release(&world.report->finished, epoch);
    }
}

int launch_combine(const epcomm_cuda_combine& call, cudaStream_t stream) {
    if (call.num_blocks < 1 || call.num_threads < 32 || call.num_threads % 32 != 0 || call.max_dests > EPCOMM_CUDA_MAX_DESTS ||
        call.row_bytes % 16 != 0) {
        return cudaErrorInvalidValue;
    }
    if (call.announcement.format == EPCOMM_FORMAT_F32) {
        const int threads = call.num_threads < kThreads<true> ? call.num_threads : kThreads<true>;
        return launch(combine_kernel<true>, call, call.num_blocks, threads, 0, stream);
    }
    const int threads = call.num_threads < kThreads<false> ? call.num_threads : kThreads<false>;
    return launch(combine_kernel<false>, call, call.num_blocks, threads, 0, stream);
}

int load_combine() {
    const int error = load(combine_kernel<true>);
    return error != 0 ? error : load(combine_kernel<false>);
}

}  // namespace epcomm
