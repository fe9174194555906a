// Launches the kernel of a two-hop combine.
#include "launch.cuh"
#include "two_hop_combine.cuh"

namespace epcomm {

int launch_two_hop_combine(const epcomm_cuda_two_hop_combine& all, cudaStream_t stream) {
    const epcomm_cuda_combine& call = all.call;
    const int wire = call.announcement.wire;
    if (call.num_blocks < 1 || call.num_threads < 32 || call.num_threads % 32 != 0 ||
        call.routes.max_dests != call.world.num_topk || call.row_bytes % 16 != 0 ||
        (wire != EPCOMM_FORMAT_F32 && wire != EPCOMM_FORMAT_BF16)) {
        return cudaErrorInvalidValue;
    }
    const bool f32 = call.announcement.format == EPCOMM_FORMAT_F32;
    const bool wire_f32 = wire == EPCOMM_FORMAT_F32;
    const int threads = call.num_threads < kTwoHopSumThreads ? call.num_threads : kTwoHopSumThreads;
    const auto kernel =
        f32 ? (wire_f32 ? two_hop_combine_kernel<true, true> : two_hop_combine_kernel<true, false>)
            : (wire_f32 ? two_hop_combine_kernel<false, true>
                        : two_hop_combine_kernel<false, false>);
    return launch(kernel, all, call.num_blocks, threads, 0, stream);
}

int load_two_hop_combine() {
    int error = load(two_hop_combine_kernel<true, true>);
    if (error == 0) error = load(two_hop_combine_kernel<true, false>);
    if (error == 0) error = load(two_hop_combine_kernel<false, true>);
    if (error == 0) error = load(two_hop_combine_kernel<false, false>);
    return error;
}

}  // namespace epcomm
