// Sums of a two-hop combine, in float32 and in the oracle's order: within a node by (local rank,
// choice), then over nodes. A lane has kSumColumns columns of 16 bytes of the row at a time.
#pragma once

#include "labels.cuh"
#include "move.cuh"
#include "reduce.cuh"

namespace epcomm {

constexpr int kSumColumns = 2;
constexpr int kSumCopies = 4;  ///< of each column, that a lane has in flight

/// Accumulators of a lane.
template <bool f32>
struct Sums {
    float column[kSumColumns][kElements<f32>];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int u = 0; u < kSumColumns; ++u) {
#pragma unroll
            for (int e = 0; e < kElements<f32>; ++e) column[u][e] = 0.0f;
        }
    }

    __device__ __forceinline__ void add(const Sums& other) {
#pragma unroll
        for (int u = 0; u < kSumColumns; ++u) {
#pragma unroll
            for (int e = 0; e < kElements<f32>; ++e) {
                column[u][e] = __fadd_rn(column[u][e], other.column[u][e]);
            }
        }
    }
};

/// A token's rows in this node: the lanes of `lanes` hold their addresses and weights, in order.
struct NearRows {
    unsigned lanes;
    uint8_t* row;
    float weight;
};

template <bool weighted>
__device__ __forceinline__ NearRows near_rows(const CopyList& copies, const Offer* offers,
                                              int row_bytes) {
    NearRows rows = {copies.rows, nullptr, 1.0f};
    if (copies.local >= 0) {
        const Offer& offer = offers[copies.local];
        rows.row = const_cast<uint8_t*>(offer.rows) + int64_t(copies.row) * row_bytes;
        if (weighted && offer.weights != nullptr) rows.weight = offer.weights[copies.row];
    }
    return rows;
}

/// Byte offset of this lane's column u, of a warp's columns from `first` on.
__device__ __forceinline__ int column_at(int first, int u) {
    return first + (u * 32 + lane_id()) * 16;
}

/// Sum the node's rows into cleared `sums`. The whole warp.
///
/// A load that a lane may skip leaves its registers as they were, which keeps them alive in the
/// loops around this one; so they are cleared first.
template <bool f32, bool weighted>
__device__ __forceinline__ void sum_near(const NearRows& rows, int first, int row_bytes,
                                         Sums<f32>* sums) {
    unsigned left = rows.lanes;
    while (left != 0) {
        uint4 v[kSumCopies][kSumColumns];
        float by[kSumCopies];
        int count = 0;
#pragma unroll
        for (int i = 0; i < kSumCopies; ++i) {
            const int from = left == 0 ? 0 : __ffs(int(left)) - 1;
            const uint8_t* row = shuffle_pointer(rows.row, from);
            by[i] = __shfl_sync(kWarp, rows.weight, from);
#pragma unroll
            for (int u = 0; u < kSumColumns; ++u) v[i][u] = {};
            if (left == 0) continue;
            left &= left - 1;
            ++count;
#pragma unroll
            for (int u = 0; u < kSumColumns; ++u) {
                const int at = column_at(first, u);
                if (at < row_bytes) v[i][u] = load_once(row + at);
            }
        }
#pragma unroll
        for (int i = 0; i < kSumCopies; ++i) {
            if (i >= count) continue;
#pragma unroll
            for (int u = 0; u < kSumColumns; ++u) {
                if (column_at(first, u) < row_bytes) {
                    accumulate<f32, weighted>(v[i][u], by[i], sums->column[u]);
                }
            }
        }
    }
}

/// The top-k weight that lane k's choice has at its row in this node; false: it has none here.
__device__ __forceinline__ bool near_weight(const CopyList& copies, const Offer* offers,
                                            int num_topk, int layout, float* weight) {
    bool found = false;
    for (int i = 0; i < copies.count; ++i) {
        const int local = __shfl_sync(kWarp, copies.local, i);
        const int choice = __shfl_sync(kWarp, copies.choice, i);
        const int64_t row = __shfl_sync(kWarp, copies.row, i);
        if (choice != lane_id()) continue;
        const float* weights = offers[local].topk_weights;
        *weight = layout == EPCOMM_LAYOUT_EXPERT ? weights[row] : weights[row * num_topk + choice];
        found = true;
    }
    return found;
}

}  // namespace epcomm
