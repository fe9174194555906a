// Launches the kernel of a two-hop combine.
#include "launch.cuh"
#include "two_hop_combine.cuh"

namespace epcomm {

template <class Kind>
auto two_hop_combine_of(bool f32, int wire) {
    return with_formats<Kind::kFewKernels>(
        f32, wire, [](auto formats) { return two_hop_combine_kernel<Kind, decltype(formats)>; });
}

int launch_two_hop_combine(const epcomm_cuda_two_hop_combine& all, cudaStream_t stream) {
    const epcomm_cuda_combine& call = all.call;
    const int wire = call.announcement.wire;
    if (call.num_blocks < 1 || call.num_threads < 32 || call.num_threads % 32 != 0 ||
        call.routes.max_dests != call.world.num_topk || call.row_bytes % 16 != 0 ||
        two_hop_combine_of<ByProxy>(true, wire) == nullptr) {
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
        const int most = kTwoHopSumThreads<Kind>;
        const int threads = call.num_threads < most ? call.num_threads : most;
        return launch(two_hop_combine_of<Kind>(f32, wire),
                      {call.num_blocks, threads, two_hop_combine_shared<Kind>(all, threads)},
                      stream, all);
    });
}

template <class Kind>
int load_two_hop_combine_kind() {
    int error = 0;
    for (const int wire :
         {EPCOMM_FORMAT_F32, EPCOMM_FORMAT_BF16, EPCOMM_FORMAT_LOGFMT8, EPCOMM_FORMAT_LOGFMT10}) {
        for (const bool f32 : {false, true}) {
            if (error == 0) error = load(two_hop_combine_of<Kind>(f32, wire));
        }
    }
    return error;
}

int load_two_hop_combine() {
    return with_each_staging_kind(
        [](auto kind) { return load_two_hop_combine_kind<decltype(kind)>(); });
}

}  // namespace epcomm
