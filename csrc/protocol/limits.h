/// Every limit epcomm has, with the field that causes it. Checked when a Buffer is made.
#pragma once

/// X(name, value): the widest value the wire records and counters can carry.
///   max_ranks         rank fields are 16 bits wide, signed
///   max_local_ranks   counters per control block; the record's rank mask is one 64-bit word
///   max_experts       expert ids are 32 bits wide; bounded so that an announcement stays small
///   max_topk          a record's per-choice arrays; kernels keep one row of them on the stack
///   max_tokens        rows are 32-bit indices over all ranks' tokens and choices
///   max_hidden        byte offsets inside a record are 32 bits wide
///   max_alignment     padding rows an expert may cost a window
///   row_align         a row is a whole number of 16-byte units, the widest plain load and store
///   record_align      records start on 16 bytes in staging and on the wire
///   tile              channels that share one scale
///   window_align      parts of a window start on cache-line pairs
#define EPCOMM_LIMITS(X)   \
    X(max_ranks, 4096)     \
    X(max_local_ranks, 64) \
    X(max_experts, 65536)  \
    X(max_topk, 256)       \
    X(max_tokens, 1 << 20) \
    X(max_hidden, 1 << 20) \
    X(max_alignment, 1024) \
    X(row_align, 16)       \
    X(record_align, 16)    \
    X(tile, 128)           \
    X(window_align, 128)   \
    X(abi_version, 1)

enum {
#define EPCOMM_LIMIT_ENUM(name, value) EPCOMM_LIMIT_##name = (value),
    EPCOMM_LIMITS(EPCOMM_LIMIT_ENUM)
#undef EPCOMM_LIMIT_ENUM
};
