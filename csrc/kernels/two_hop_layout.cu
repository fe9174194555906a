// Launches the layout kernel of the two-hop path.
#include "launch.cuh"
#include "two_hop_layout.cuh"

namespace epcomm {

int launch_two_hop_layout(const epcomm_cuda_two_hop_layout& all, cudaStream_t stream) {
    if (all.call.num_blocks < 1 || all.call.world.num_topk > EPCOMM_CUDA_MAX_DESTS) {
        return cudaErrorInvalidValue;
    }
    int warps = kLayoutWarps;
    while (warps > 1 && 4 * TwoHopLayoutShared::ints(all, warps) > shared_limit()) warps /= 2;
    const int64_t bytes = 4 * TwoHopLayoutShared::ints(all, warps);
    if (bytes > shared_limit()) return cudaErrorInvalidValue;
    return with_fabric_kind(all.rail, [&](auto kind) {
        return launch(two_hop_layout_kernel<decltype(kind)>,
                      {all.call.num_blocks, 32 * warps, bytes}, stream, all);
    });
}

int load_two_hop_layout() {
    return with_each_fabric_kind(
        [](auto kind) { return load(two_hop_layout_kernel<decltype(kind)>); });
}

}  // namespace epcomm
