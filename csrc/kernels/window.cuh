// Where the parts of an output lie in a window. A function of the row count alone, so that every
// writer finds them without being told.
#pragma once

#include "epcomm_cuda.h"

namespace epcomm {

__host__ __device__ inline epcomm_cuda_parts window_parts(const epcomm_cuda_row& row,
                                                          int64_t rows) {
    const int64_t align = EPCOMM_LIMIT_window_align;
    const bool by_rank = row.layout == EPCOMM_LAYOUT_RANK;
    const int64_t weights = row.with_weights ? (by_rank ? 4 * int64_t(row.num_topk) : 4) : 0;
    epcomm_cuda_parts parts;
    parts.rows = 0;
    parts.scales = epcomm_align(rows * row.row_bytes, align);
    parts.topk_idx = parts.scales + epcomm_align(rows * row.scale_bytes, align);
    parts.topk_weights =
        parts.topk_idx +
        (row.with_topk && by_rank ? epcomm_align(rows * 8 * int64_t(row.num_topk), align) : 0);
    parts.source = parts.topk_weights + epcomm_align(rows * weights, align);
    parts.bytes = parts.source + (row.with_topk ? epcomm_align(rows * 8, align) : 0);
    return parts;
}

}  // namespace epcomm
