/// What a rank tells every other rank before a call moves data.
///
/// On the wire and in shared memory an announcement is
///
///     epcomm_announcement | node_tokens i32[N] | rank_rows i32[R] | expert_rows i32[E]
///
/// `node_tokens[n]`: distinct tokens with a destination on node n (= records sent there).
/// `rank_rows[r]`: distinct tokens with a destination on rank r. `expert_rows[e]`: tokens that
/// chose expert e. A first dispatch fills the counts in; other calls leave
/// them zero.
///
/// Every rank sends its announcement to its rail peer on every other node and publishes, in its
/// own control segment, its own and the ones its rail peers sent it. So each node holds all R
/// announcements, every rank sees the same ones, and all reach the same verdict before a byte of
/// data moves: a rank whose arguments were refused says so in `status`, and nobody sends.
#pragma once

#include <stdint.h>

typedef enum {
    EPCOMM_OP_NONE = 0,
    EPCOMM_OP_DISPATCH = 1,
    EPCOMM_OP_CACHED_DISPATCH = 2,
    EPCOMM_OP_COMBINE = 3,
} epcomm_op;

typedef enum {
    EPCOMM_STATUS_OK = 0,
    EPCOMM_STATUS_REFUSED = 1,  ///< this rank's arguments were refused; `reason` says why
} epcomm_status;

enum { EPCOMM_REASON_BYTES = 232 };

typedef struct {
    uint64_t epoch;  ///< number of the call, counted by every rank's host
    int32_t op;      ///< epcomm_op
    int32_t status;  ///< epcomm_status
    // Must agree on all ranks.
    int32_t format;         ///< epcomm_format of the rows
    int32_t layout;         ///< epcomm_layout
    int32_t alignment;      ///< layout expert: rows of an expert are a multiple of this
    int32_t with_weights;   ///< top-k weights travel
    int32_t fixed_rows;     ///< rows of a fixed-size output; -1 = as many as arrive
    int32_t wire;           ///< epcomm_format of a combine record
    uint64_t handle_epoch;  ///< the dispatch a cached dispatch or a combine refers to
    // May differ.
    int32_t num_tokens;   ///< T of this rank
    int32_t row_weights;  ///< combine: rows carry a weight
    // Where the owner's node peers write (dispatch) or read (combine) rows.
    int32_t window_fd;      ///< descriptor of the window in the owner's process
    int32_t window_serial;  ///< tells reused descriptors apart
    uint64_t window_bytes;
    uint64_t rows_offset;  ///< combine: byte offset of the rows in the window
    uint64_t weights_offset;
    uint64_t topk_offset;
    char reason[EPCOMM_REASON_BYTES];
} epcomm_announcement;
