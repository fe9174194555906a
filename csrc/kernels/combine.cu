// Combine on the host: launches the kernel for a call.
#include "combine.cuh"
#include "launch.cuh"

namespace epcomm {

template <bool f32, bool many>
int launch_combine_of(const epcomm_cuda_combine& call, cudaStream_t stream) {
    const PullPlan plan = plan_combine(call);
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
