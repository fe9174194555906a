// Launches the data kernel of a two-hop dispatch.
#include "launch.cuh"
#include "two_hop_dispatch.cuh"

namespace epcomm {

template <int packing>
int launch_two_hop_packing(epcomm_cuda_two_hop_dispatch all, cudaStream_t stream) {
    // Fewer warps where shared memory is smaller than sm_90's.
    while (all.call.num_warps > 2 && two_hop_dispatch_shared(all, packing) > shared_limit()) {
        --all.call.num_warps;
    }
    const int64_t bytes = two_hop_dispatch_shared(all, packing);
    if (bytes > shared_limit()) return cudaErrorInvalidValue;
    return with_staging_kind(all.rail, [&](auto kind) {
        return launch(two_hop_dispatch_kernel<decltype(kind), packing>,
                      {all.call.num_blocks, 32 * all.call.num_warps, bytes}, stream, all);
    });
}

int launch_two_hop_dispatch(const epcomm_cuda_two_hop_dispatch& all, cudaStream_t stream) {
    const epcomm_cuda_dispatch& call = all.call;
    if (call.num_blocks < 1 || call.num_warps < 1 || 32 * call.num_warps > kTwoHopThreads ||
        call.routes.max_dests != call.world.num_topk || call.row_in_bytes % 16 != 0) {
        return cudaErrorInvalidValue;
    }
    // One that sends and one that forwards. A refused call has no routes and does neither.
    const bool moves = all.hops.sent != nullptr;
    if (epcomm_is_bounded(&all.rail.chunking) && moves && call.num_warps < 2) {
        return cudaErrorInvalidValue;
    }
    const bool packs = call.announcement.format != call.input_format;
    if (!packs) return launch_two_hop_packing<0>(all, stream);
    if (call.input_format == EPCOMM_FORMAT_BF16) return launch_two_hop_packing<1>(all, stream);
    if (call.input_format == EPCOMM_FORMAT_F32) return launch_two_hop_packing<2>(all, stream);
    return cudaErrorInvalidValue;
}

template <class Kind>
int load_two_hop_dispatch_kind() {
    int error = load(two_hop_dispatch_kernel<Kind, 0>);
    if (error == 0) error = load(two_hop_dispatch_kernel<Kind, 1>);
    if (error == 0) error = load(two_hop_dispatch_kernel<Kind, 2>);
    return error;
}

int load_two_hop_dispatch() {
    return with_each_staging_kind(
        [](auto kind) { return load_two_hop_dispatch_kind<decltype(kind)>(); });
}

}  // namespace epcomm
