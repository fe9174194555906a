// Tells Python the layouts of the CUDA back end's structures, so that it repeats none of them.
#include "../host/describe.h"
#include "epcomm_cuda_rail.h"

namespace {

#define FIELD(structure, field)                                 \
    epcomm::describe<decltype(epcomm_cuda_##structure::field)>( \
        "cuda_" #structure, #field, offsetof(epcomm_cuda_##structure, field))
/// The size of a structure, as a field of no bytes at its end.
#define END(structure) \
    epcomm_field{"cuda_" #structure, "", uint32_t(sizeof(epcomm_cuda_##structure)), 0, 0, 'u'}

constexpr epcomm_field kFields[] = {
    FIELD(error, verdict),
    FIELD(error, op),
    FIELD(error, phase),
    FIELD(error, channel),
    FIELD(error, reporter),
    FIELD(error, rank),
    FIELD(error, epoch),
    FIELD(error, expected),
    FIELD(error, seen),
    END(error),
    FIELD(report, prepared),
    FIELD(report, epoch),
    FIELD(report, verdict),
    FIELD(report, rows),
    FIELD(report, max_rows),
    FIELD(report, bad_choice),
    FIELD(report, free_windows),
    FIELD(report, failed),
    FIELD(report, refusals),
    FIELD(report, acknowledged),
    FIELD(report, refused_epoch),
    FIELD(report, refused_verdict),
    FIELD(report, refused_choice),
    FIELD(report, error),
    END(report),
    FIELD(times, call),
    FIELD(times, at),
    END(times),
    FIELD(control, bad_choice),
    FIELD(control, epoch),
    FIELD(control, times),
    FIELD(control, aborted),
    END(control),
    FIELD(world, rank),
    FIELD(world, num_ranks),
    FIELD(world, num_nodes),
    FIELD(world, local_rank),
    FIELD(world, num_local),
    FIELD(world, node_ranks),
    FIELD(world, num_experts),
    FIELD(world, num_topk),
    FIELD(world, num_windows),
    FIELD(world, delay_ns),
    FIELD(world, timeout_ns),
    FIELD(world, controls),
    FIELD(world, windows),
    FIELD(world, report),
    FIELD(world, block_bins),
    END(world),
    FIELD(row, row_bytes),
    FIELD(row, scale_bytes),
    FIELD(row, num_topk),
    FIELD(row, layout),
    FIELD(row, with_topk),
    FIELD(row, with_weights),
    END(row),
    FIELD(parts, rows),
    FIELD(parts, scales),
    FIELD(parts, topk_idx),
    FIELD(parts, topk_weights),
    FIELD(parts, source),
    FIELD(parts, bytes),
    END(parts),
    FIELD(routes, topk_idx),
    FIELD(routes, dests),
    FIELD(routes, rows),
    FIELD(routes, group_start),
    FIELD(routes, group_count),
    FIELD(routes, verdict),
    FIELD(routes, num_tokens),
    FIELD(routes, max_dests),
    END(routes),
    FIELD(layout, world),
    FIELD(layout, announcement),
    FIELD(layout, number),
    FIELD(layout, row),
    FIELD(layout, routes),
    FIELD(layout, num_blocks),
    END(layout),
    FIELD(dispatch, world),
    FIELD(dispatch, announcement),
    FIELD(dispatch, number),
    FIELD(dispatch, row),
    FIELD(dispatch, routes),
    FIELD(dispatch, x),
    FIELD(dispatch, scales),
    FIELD(dispatch, topk_weights),
    FIELD(dispatch, row_in_bytes),
    FIELD(dispatch, input_format),
    FIELD(dispatch, announce),
    FIELD(dispatch, num_blocks),
    FIELD(dispatch, num_warps),
    FIELD(dispatch, stages),
    END(dispatch),
    FIELD(combine, world),
    FIELD(combine, announcement),
    FIELD(combine, number),
    FIELD(combine, routes),
    FIELD(combine, bias),
    FIELD(combine, out),
    FIELD(combine, topk_weights),
    FIELD(combine, row_bytes),
    FIELD(combine, layout),
    FIELD(combine, num_blocks),
    FIELD(combine, num_threads),
    END(combine),
    FIELD(place, node),
    FIELD(place, local),
    END(place),
    FIELD(rail, chunking),
    FIELD(rail, fabric),
    FIELD(rail, places),
    FIELD(rail, rail),
    FIELD(rail, send),
    FIELD(rail, receive),
    FIELD(rail, outbox),
    FIELD(rail, inbox),
    FIELD(rail, signals),
    FIELD(rail, expected),
    FIELD(rail, filled),
    FIELD(rail, dealt),
    END(rail),
    FIELD(hops, index),
    FIELD(hops, far),
    FIELD(hops, token_of),
    FIELD(hops, base),
    FIELD(hops, forwarded),
    FIELD(hops, sent),
    FIELD(hops, received),
    FIELD(hops, max_far),
    FIELD(hops, num_keys),
    END(hops),
    FIELD(two_hop_layout, call),
    FIELD(two_hop_layout, rail),
    FIELD(two_hop_layout, hops),
    END(two_hop_layout),
    FIELD(two_hop_dispatch, call),
    FIELD(two_hop_dispatch, rail),
    FIELD(two_hop_dispatch, hops),
    FIELD(two_hop_dispatch, record),
    FIELD(two_hop_dispatch, forward_list),
    END(two_hop_dispatch),
    FIELD(two_hop_combine, call),
    FIELD(two_hop_combine, rail),
    FIELD(two_hop_combine, hops),
    FIELD(two_hop_combine, record),
    END(two_hop_combine),
    FIELD(sequence, done),
    FIELD(sequence, stream),
    FIELD(sequence, used),
    FIELD(sequence, capture),
    END(sequence),
    FIELD(calibrate, from),
    FIELD(calibrate, to),
    FIELD(calibrate, from_rows),
    FIELD(calibrate, to_rows),
    FIELD(calibrate, num_rows),
    FIELD(calibrate, row_bytes),
    FIELD(calibrate, copies),
    FIELD(calibrate, num_blocks),
    FIELD(calibrate, num_warps),
    END(calibrate),
};

constexpr epcomm_constant kConstants[] = {
#define CONSTANT(name) {#name, EPCOMM_CUDA_##name},
    CONSTANT(MAX_LOCAL) CONSTANT(MAX_DESTS) CONSTANT(MAX_EXPERTS) CONSTANT(OK) CONSTANT(REFUSED)
        CONSTANT(MISMATCH) CONSTANT(GROW) CONSTANT(FIXED_ROWS) CONSTANT(TIMEOUT) CONSTANT(ABORTED)
            CONSTANT(FABRIC) CONSTANT(STALE) CONSTANT(STAMPS) CONSTANT(TIMED_CALLS)
                CONSTANT(STAMP_START) CONSTANT(STAMP_COUNTED) CONSTANT(STAMP_ANNOUNCED)
                    CONSTANT(STAMP_PLACED) CONSTANT(STAMP_MOVED) CONSTANT(STAMP_END)
#undef CONSTANT
};

}  // namespace

extern "C" {

const epcomm_field* epcomm_cuda_fields(uint32_t* count) {
    *count = uint32_t(sizeof(kFields) / sizeof(kFields[0]));
    return kFields;
}

const epcomm_constant* epcomm_cuda_constants(uint32_t* count) {
    *count = uint32_t(sizeof(kConstants) / sizeof(kConstants[0]));
    return kConstants;
}

}  // extern "C"
