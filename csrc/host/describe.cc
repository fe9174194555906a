// Tells Python the protocol's integers, numbers and structure layouts, so that it repeats none of
// them.

#include <stddef.h>

#include "epcomm.h"

namespace {

template <typename T>
constexpr char kind_of() {
    if constexpr (T(0.5) != T(0)) {
        return 'f';
    } else {
        return T(-1) < T(0) ? 'i' : 'u';
    }
}

constexpr epcomm_constant kConstants[] = {
#define LIMIT(name, value) {"limit_" #name, EPCOMM_LIMIT_##name},
    EPCOMM_LIMITS(LIMIT)
#undef LIMIT
#define ENUMERATOR(name) {#name, EPCOMM_##name}
        ENUMERATOR(FORMAT_F32),
    ENUMERATOR(FORMAT_BF16),
    ENUMERATOR(FORMAT_FP8),
    ENUMERATOR(FORMAT_FP8_UE8M0),
    ENUMERATOR(FORMAT_LOGFMT8),
    ENUMERATOR(FORMAT_LOGFMT10),
    ENUMERATOR(LAYOUT_RANK),
    ENUMERATOR(LAYOUT_EXPERT),
    ENUMERATOR(OP_NONE),
    ENUMERATOR(OP_DISPATCH),
    ENUMERATOR(OP_CACHED_DISPATCH),
    ENUMERATOR(OP_COMBINE),
    ENUMERATOR(STATUS_OK),
    ENUMERATOR(STATUS_REFUSED),
    ENUMERATOR(PHASE_NONE),
    ENUMERATOR(PHASE_ANNOUNCE),
    ENUMERATOR(PHASE_DATA),
    ENUMERATOR(PHASE_ARRIVE),
    ENUMERATOR(PHASE_RETURN),
    ENUMERATOR(PHASE_RELEASE),
    ENUMERATOR(PHASE_FAILED),
    ENUMERATOR(WAIT_OK),
    ENUMERATOR(WAIT_TIMEOUT),
    ENUMERATOR(WAIT_PEER_GONE),
    ENUMERATOR(WAIT_ABORTED),
    ENUMERATOR(PLAN_OK),
    ENUMERATOR(PLAN_TOO_LARGE),
    ENUMERATOR(PLAN_TOO_SMALL),
    ENUMERATOR(REGION_SEND),
    ENUMERATOR(REGION_RECEIVE),
    ENUMERATOR(REGION_OUTBOX),
    ENUMERATOR(REGION_INBOX),
    ENUMERATOR(REASON_BYTES),
#undef ENUMERATOR
    {"sizeof_counter", sizeof(epcomm_counter)},
    {"sizeof_control", sizeof(epcomm_control)},
    {"sizeof_announcement", sizeof(epcomm_announcement)},
    {"sizeof_chunking", sizeof(epcomm_chunking)},
};

constexpr epcomm_number kNumbers[] = {
#define NUMBER(name, value) {#name, value},
    EPCOMM_NUMBERS(NUMBER)
#undef NUMBER
};

#define FIELD_OF(structure, field, type, count) \
    {#structure, #field, offsetof(epcomm_##structure, field), sizeof(type), count, kind_of<type>()}
#define FIELD(structure, field) FIELD_OF(structure, field, decltype(epcomm_##structure::field), 1)
#define TEXT(structure, field)                                                                   \
    {#structure, #field, offsetof(epcomm_##structure, field), sizeof(epcomm_##structure::field), \
     1,          'S'}
// Nested structures and arrays of them are described by their byte offset only.
#define PART(structure, field)               \
    {                                        \
        #structure,                          \
        #field,                              \
        offsetof(epcomm_##structure, field), \
        1,                                   \
        sizeof(epcomm_##structure::field),   \
        'u'}

constexpr epcomm_field kFields[] = {
    FIELD(announcement, epoch),
    FIELD(announcement, op),
    FIELD(announcement, status),
    FIELD(announcement, format),
    FIELD(announcement, layout),
    FIELD(announcement, alignment),
    FIELD(announcement, with_weights),
    FIELD(announcement, fixed_rows),
    FIELD(announcement, wire),
    FIELD(announcement, handle_epoch),
    FIELD(announcement, num_tokens),
    FIELD(announcement, row_weights),
    FIELD(announcement, window_fd),
    FIELD(announcement, window_serial),
    FIELD(announcement, window_bytes),
    FIELD(announcement, rows_offset),
    FIELD(announcement, weights_offset),
    FIELD(announcement, topk_offset),
    TEXT(announcement, reason),
    FIELD(record_meta, rank_mask),
    FIELD(record_meta, source_rank),
    FIELD(record_meta, source_token),
    FIELD(record_shape, format),
    FIELD(record_shape, hidden),
    FIELD(record_shape, num_topk),
    FIELD(record_shape, with_weights),
    FIELD(record, payload),
    FIELD(record, scales),
    FIELD(record, meta),
    FIELD(record, expert),
    FIELD(record, row),
    FIELD(record, weight),
    FIELD(record, bytes),
    FIELD(record, payload_bytes),
    FIELD(record, scale_bytes),
    FIELD(chunking, num_nodes),
    FIELD(chunking, node),
    FIELD(chunking, max_records),
    FIELD(chunking, chunk_records),
    FIELD(chunking, num_chunks),
    FIELD(chunking, held_chunks),
    FIELD(chunking, num_channels),
    FIELD(chunking, ahead_records),
    FIELD(chunking, peer_bytes),
    FIELD(chunking, ahead_bytes),
    FIELD(chunk_item, step),
    FIELD(chunk_item, slot),
    FIELD(slot_place, chunk),
    FIELD(slot_place, lap),
    FIELD(slot_place, channel),
    FIELD(slot_place, signal),
    FIELD(slot_place, credit_signal),
    FIELD(slot_place, announce_signal),
    FIELD(slot_place, offset),
    FIELD_OF(slot_place, send_offset, int64_t, 2),
    FIELD(item_place, slot),
    FIELD(item_place, send_node),
    FIELD(item_place, receive_node),
    FIELD(wait_state, waiting),
    FIELD(wait_state, op),
    FIELD(wait_state, phase),
    FIELD(wait_state, rank),
    FIELD(wait_state, epoch),
    FIELD(wait_state, expected),
    FIELD(wait_state, seen),
    FIELD(control, rank),
    FIELD(control, pid),
    FIELD(control, abi_version),
    PART(control, announced),
    PART(control, aborted),
    PART(control, arrived),
    PART(control, released),
    PART(control, wait),
    PART(control, error),
};

template <typename T, uint32_t n>
constexpr uint32_t length(const T (&)[n]) {
    return n;
}

bool in_limits(const epcomm_record_shape* shape) {
    return epcomm_format_payload(shape->format, 0) >= 0 && shape->hidden > 0 &&
           shape->hidden <= EPCOMM_LIMIT_max_hidden && shape->num_topk > 0 &&
           shape->num_topk <= EPCOMM_LIMIT_max_topk;
}

}  // namespace

extern "C" {

const epcomm_constant* epcomm_constants(uint32_t* count) {
    *count = length(kConstants);
    return kConstants;
}

const epcomm_number* epcomm_numbers(uint32_t* count) {
    *count = length(kNumbers);
    return kNumbers;
}

const epcomm_field* epcomm_fields(uint32_t* count) {
    *count = length(kFields);
    return kFields;
}

int epcomm_dispatch_record(const epcomm_record_shape* shape, epcomm_record* record) {
    if (!in_limits(shape)) return -1;
    epcomm_lay_out_dispatch(shape, record);
    return 0;
}

int epcomm_combine_record(const epcomm_record_shape* shape, epcomm_record* record) {
    if (!in_limits(shape)) return -1;
    epcomm_lay_out_combine(shape, record);
    return 0;
}

int64_t epcomm_payload_bytes(int32_t format, int64_t hidden) {
    return epcomm_format_payload(format, hidden);
}

int64_t epcomm_scale_bytes(int32_t format, int64_t hidden) {
    return epcomm_format_scales(format, hidden);
}

}  // extern "C"
