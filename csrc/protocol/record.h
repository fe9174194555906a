/// The records that cross the scale-out network: one per (token, destination node).
///
/// Dispatch record, every part on a 16-byte boundary:
///
///     payload | scales | epcomm_record_meta | expert i32[K] | row i32[K] | weight f32[K]
///
/// `expert[k]` is the global expert id of the token's k-th choice, or -1. `row[k]` is the token's
/// index among this source's rows at the rank (layout rank) or at the expert (layout expert)
/// that choice k goes to, or -1 where that rank is not on the receiving node. The receiver adds
/// the base row, which it knows from the announcements, and stores the row; it needs nothing else.
///
/// Combine record: payload | weight f32[K] (present only if top-k weights travel back). Records
/// of one source come back in the order in which its dispatch records went out, so that they
/// carry no index.
#pragma once

#include <stdint.h>

#include "host_device.h"
#include "limits.h"

/// What the bytes of a row mean.
typedef enum {
    EPCOMM_FORMAT_F32 = 0,
    EPCOMM_FORMAT_BF16 = 1,
    EPCOMM_FORMAT_FP8 = 2,        ///< E4M3, one f32 scale per 128 channels
    EPCOMM_FORMAT_FP8_UE8M0 = 3,  ///< E4M3, one power-of-two scale byte per 128 channels
    EPCOMM_FORMAT_LOGFMT8 = 4,
    EPCOMM_FORMAT_LOGFMT10 = 5,
} epcomm_format;

/// How a rank's output rows are ordered.
typedef enum {
    EPCOMM_LAYOUT_RANK = 0,    ///< one row per (token, rank), by (source rank, source token)
    EPCOMM_LAYOUT_EXPERT = 1,  ///< one row per (token, expert), grouped by local expert, aligned
} epcomm_layout;

typedef struct {
    int32_t format;        ///< epcomm_format
    int32_t hidden;        ///< H, elements
    int32_t num_topk;      ///< K
    int32_t with_weights;  ///< combine: top-k weights travel back
} epcomm_record_shape;

/// Byte offsets of a record's parts, and its size. A part of 0 bytes has the offset of the next.
typedef struct {
    int32_t payload;
    int32_t scales;
    int32_t meta;
    int32_t expert;
    int32_t row;
    int32_t weight;
    int32_t bytes;
    int32_t payload_bytes;  ///< used bytes of the payload
    int32_t scale_bytes;    ///< used bytes of the scales
} epcomm_record;

/// Fixed part of a dispatch record.
typedef struct {
    uint64_t rank_mask;  ///< bit l: local rank l of the receiving node gets a row
    int32_t source_rank;
    int32_t source_token;
} epcomm_record_meta;

EPCOMM_HD static inline int64_t epcomm_align(int64_t bytes, int64_t to) {
    return (bytes + to - 1) / to * to;
}

EPCOMM_HD static inline int64_t epcomm_tiles(int64_t hidden) {
    return (hidden + EPCOMM_LIMIT_tile - 1) / EPCOMM_LIMIT_tile;
}

/// LogFMT codes of one row: tiles are packed apart, so a partial last tile rounds up to bytes.
EPCOMM_HD static inline int64_t epcomm_logfmt_code_bytes(int64_t hidden, int64_t bits) {
    const int64_t full = hidden / EPCOMM_LIMIT_tile, tail = hidden % EPCOMM_LIMIT_tile;
    return full * (EPCOMM_LIMIT_tile * bits / 8) + (tail * bits + 7) / 8;
}

EPCOMM_HD static inline int64_t epcomm_format_payload(int32_t format, int64_t hidden) {
    switch (format) {
        case EPCOMM_FORMAT_F32: return hidden * 4;
        case EPCOMM_FORMAT_BF16: return hidden * 2;
        case EPCOMM_FORMAT_FP8: return hidden;
        case EPCOMM_FORMAT_FP8_UE8M0: return hidden;
        case EPCOMM_FORMAT_LOGFMT8: return epcomm_logfmt_code_bytes(hidden, 8);
        case EPCOMM_FORMAT_LOGFMT10: return epcomm_logfmt_code_bytes(hidden, 10);
        default: return -1;
    }
}

EPCOMM_HD static inline int64_t epcomm_format_scales(int32_t format, int64_t hidden) {
    switch (format) {
        case EPCOMM_FORMAT_F32:
        case EPCOMM_FORMAT_BF16: return 0;
        case EPCOMM_FORMAT_FP8: return epcomm_tiles(hidden) * 4;
        case EPCOMM_FORMAT_FP8_UE8M0: return epcomm_align(epcomm_tiles(hidden), 4);
        case EPCOMM_FORMAT_LOGFMT8:
        case EPCOMM_FORMAT_LOGFMT10: return epcomm_tiles(hidden) * 4;
        default: return -1;
    }
}

EPCOMM_HD static inline void epcomm_lay_out_dispatch(const epcomm_record_shape* shape,
                                                     epcomm_record* record) {
    const int64_t choices = epcomm_align(4 * (int64_t)shape->num_topk, EPCOMM_LIMIT_record_align);
    const int64_t payload = epcomm_format_payload(shape->format, shape->hidden);
    const int64_t scales = epcomm_format_scales(shape->format, shape->hidden);
    record->payload = 0;
    record->payload_bytes = (int32_t)payload;
    record->scale_bytes = (int32_t)scales;
    record->scales = (int32_t)epcomm_align(payload, EPCOMM_LIMIT_record_align);
    record->meta = record->scales + (int32_t)epcomm_align(scales, EPCOMM_LIMIT_record_align);
    record->expert = record->meta + (int32_t)sizeof(epcomm_record_meta);
    record->row = record->expert + (int32_t)choices;
    record->weight = record->row + (int32_t)choices;
    record->bytes = record->weight + (int32_t)choices;
}

/// LogFMT metadata stands in for the scales; a combine record has no meta, expert or row part.
EPCOMM_HD static inline void epcomm_lay_out_combine(const epcomm_record_shape* shape,
                                                    epcomm_record* record) {
    const int64_t choices = epcomm_align(4 * (int64_t)shape->num_topk, EPCOMM_LIMIT_record_align);
    const int64_t payload = epcomm_format_payload(shape->format, shape->hidden);
    const int64_t scales = epcomm_format_scales(shape->format, shape->hidden);
    record->payload = 0;
    record->payload_bytes = (int32_t)payload;
    record->scale_bytes = (int32_t)scales;
    record->scales = (int32_t)payload;  // no gap: a LogFMT row is codes, then metadata
    record->meta = (int32_t)epcomm_align(payload + scales, EPCOMM_LIMIT_record_align);
    record->expert = record->meta;
    record->row = record->meta;
    record->weight = record->meta;
    record->bytes = record->weight + (shape->with_weights ? (int32_t)choices : 0);
}
