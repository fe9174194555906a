// Launches the kernel of a two-hop combine.
#include "launch.cuh"
#include "two_hop_combine.cuh"

namespace epcomm {

int launch_two_hop_combine(const epcomm_cuda_two_hop_combine& all, cudaStream_t stream) {
    const epcomm_cuda_combine& call = all.call;
    const int wire = call.announcement.wire, K = call.world.num_topk;
    if (call.num_blocks < 1 || call.num_threads < 32 || call.num_threads % 32 != 0 ||
        call.routes.max_dests != K || call.row_bytes % 16 != 0 || !is_wire(wire)) {
        return cudaErrorInvalidValue;
    }
    const bool f32 = call.announcement.format == EPCOMM_FORMAT_F32;
    // One warp that sends and one that finishes tokens; a refused call has no routes, and needs
    // none.
    if (epcomm_is_bounded(&all.rail.chunking) && all.hops.sent != nullptr &&
        call.num_threads < 64) {
        return cudaErrorInvalidValue;
    }
    return with_staging_kind(all.rail, [&](auto kind) {
        using Kind = decltype(kind);
        return with_formats<Kind::kFewKernels>(f32, wire, K, [&](auto formats) {
            using Formats = decltype(formats);
            constexpr int kMost = kTwoHopSumThreads<Kind, Formats> / 32;
            const auto shared = two_hop_combine_shared<Kind, Formats>;
            // Fewer warps where shared memory is smaller than sm_90's.
            int warps = call.num_threads / 32 < kMost ? call.num_threads / 32 : kMost;
            while (warps > 2 && shared(all, warps) > shared_limit()) --warps;
            return launch(two_hop_combine_kernel<Kind, Formats>,
                          {call.num_blocks, 32 * warps, shared(all, warps)}, stream, all);
        });
    });
}

template <class Kind>
int load_two_hop_combine_kind() {
    int error = 0;
    for (const int wire : {EPCOMM_FORMAT_F32, EPCOMM_FORMAT_BF16}) {
        for (const int num_topk : {1, int(EPCOMM_CUDA_MAX_DESTS)}) {
            for (const bool f32 : {false, true}) {
                if (error != 0) return error;
                error = with_formats<Kind::kFewKernels>(f32, wire, num_topk, [](auto formats) {
                    return load(two_hop_combine_kernel<Kind, decltype(formats)>);
                });
            }
        }
    }
    return error;
}

int load_two_hop_combine() {
    return with_each_staging_kind(
        [](auto kind) { return load_two_hop_combine_kind<decltype(kind)>(); });
}

}  // namespace epcomm
