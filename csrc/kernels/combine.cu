// Combine: announce that this rank's rows are ready, wait for the peers', pull and sum, then tell
// the peers that their rows have been read.
#include "call.cuh"
#include "launch.cuh"
#include "pull.cuh"
#include "return_weights.cuh"

namespace epcomm {

template <bool many>
constexpr int kMaxThreads = many ? 512 : 640;

template <bool f32, bool many>
__global__ void __launch_bounds__(kMaxThreads<many>, 1)
    combine_kernel(const __grid_constant__ epcomm_cuda_combine call,
                   const __grid_constant__ PullPlan plan) {
    extern __shared__ __align__(128) uint8_t shared[];
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
            pull_tokens<f32, many, true>(call, offers, plan, shared);
        } else {
            pull_tokens<f32, many, false>(call, offers, plan, shared);
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
    end_call(world, verdict, epoch, call.number, false);
}

template <bool f32, bool many>
int launch_combine_of(const epcomm_cuda_combine& call, cudaStream_t stream) {
    const PullPlan plan = {call.routes.max_dests < kPullCopies ? call.routes.max_dests
                                                               : kPullCopies};
    // Fewer warps where shared memory is smaller than sm_90's.
    const int64_t room = shared_limit() - int64_t(sizeof(Offer)) * EPCOMM_CUDA_MAX_LOCAL;
    int warps = (call.num_threads < kMaxThreads<many> ? call.num_threads : kMaxThreads<many>) / 32;
    while (warps > 1 && pull_bytes(plan) * warps > room) --warps;
    return launch(combine_kernel<f32, many>,
                  {call.num_blocks, 32 * warps, pull_bytes(plan) * warps}, stream, call, plan);
}

int launch_combine(const epcomm_cuda_combine& call, cudaStream_t stream) {
    if (call.num_blocks < 1 || call.num_threads < 32 || call.num_threads % 32 != 0 ||
        call.routes.max_dests > EPCOMM_CUDA_MAX_DESTS || call.row_bytes % 16 != 0) {
        return cudaErrorInvalidValue;
    }
    const bool f32 = call.announcement.format == EPCOMM_FORMAT_F32;
    if (call.routes.max_dests > kPullCopies) {
        return f32 ? launch_combine_of<true, true>(call, stream)
                   : launch_combine_of<false, true>(call, stream);
    }
    return f32 ? launch_combine_of<true, false>(call, stream)
               : launch_combine_of<false, false>(call, stream);
}

int load_combine() {
    int error = load(combine_kernel<true, true>);
    if (error == 0) error = load(combine_kernel<false, true>);
    if (error == 0) error = load(combine_kernel<true, false>);
    if (error == 0) error = load(combine_kernel<false, false>);
    return error;
}

}  // namespace epcomm
