// Launches the kernel of a two-hop combine.
#include "launch.cuh"
#include "two_hop_combine.cuh"

namespace epcomm {

template <class Kind>
auto two_hop_combine_of(bool f32, bool wire_f32) {
    return f32 ? (wire_f32 ? two_hop_combine_kernel<Kind, true, true>
                           : two_hop_combine_kernel<Kind, true, false>)
               : (wire_f32 ? two_hop_combine_kernel<Kind, false, true>
                           : two_hop_combine_kernel<Kind, false, false>);
}

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
    return with_fabric_kind(all.rail, [&](auto kind) {
        return launch(two_hop_combine_of<decltype(kind)>(f32, wire_f32), all, call.num_blocks,
                      threads, 0, stream);
    });
}

template <class Kind>
int load_two_hop_combine_kind() {
    int error = 0;
    for (int i = 0; i < 4 && error == 0; ++i) {
        error = load(two_hop_combine_of<Kind>(i % 2 != 0, i / 2 != 0));
    }
    return error;
}

int load_two_hop_combine() {
    const int error = load_two_hop_combine_kind<ByProxy>();
    return error == 0 ? load_two_hop_combine_kind<ByNic>() : error;
}

}  // namespace epcomm
