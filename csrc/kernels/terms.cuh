// What a sum among nodes is made of, and the sum: rows of this node, whose addresses a warp's lanes
// bring together in shared memory, and records of other nodes that hold rows as they are.
#pragma once

#include "columns.cuh"
#include "labels.cuh"

namespace epcomm {

/// The terms of one sum as they are listed: the rows of this node, the records of nodes before it,
/// those of nodes after it. Nodes add up in their order, and before this node's rows come the
/// records that are listed behind them; but two numbers have one sum in either order, so with at
/// most one such record the terms can be added as they are listed.
struct Terms {
    int count;
    int near;    ///< rows of this node
    int before;  ///< records of nodes before it
};

/// A warp's shared memory beside its columns.
struct TermList {
    const uint8_t* row[kPullCopies];
    float weight[kPullCopies];  ///< 1 for records
};

/// Rows' parts of 512 bytes that a warp has room for: in a ring of more columns the fewer rows they
/// have, as it takes so many bytes on their way to hide how long memory takes to answer.
constexpr int kTermParts = 16;
constexpr int kTermStages = 6;  ///< columns at most

template <int count>
constexpr int kStagesOf = count * kTermStages <= kTermParts ? kTermStages : kTermParts / count;

/// Shared memory of a warp: columns, then terms.
constexpr int64_t kTermsBytes = kTermParts * kColumn + sizeof(TermList);

/// A warp's place to sum in.
struct SumPlace {
    SharedAddress columns;  ///< this lane's 16 bytes of the first part
    TermList* list;

    __device__ __forceinline__ explicit SumPlace(uint8_t* shared) {
        uint8_t* own = shared + warp_id() * kTermsBytes;
        columns = shared_address(own) + lane_id() * 16;
        list = reinterpret_cast<TermList*>(own + kTermParts * kColumn);
    }
};

/// Put the rows of this node into an empty list. The whole warp, which is to meet then.
template <bool extras>
__device__ __forceinline__ int list_near(const CopyList& copies, const Offer* offers, int row_bytes,
                                         TermList* list) {
    if (copies.rows >> lane_id() & 1) {
        const int at = __popc(copies.rows & ((1u << lane_id()) - 1));
        const Offer& offer = offers[copies.local];
        list->row[at] = offer.rows + int64_t(copies.row) * row_bytes;
        if constexpr (extras) {
            list->weight[at] = offer.weights == nullptr ? 1.0f : offer.weights[copies.row];
        }
    }
    return __popc(copies.rows);
}

/// Sum a column where several records come before this node's rows, which are summed on their own.
template <bool f32, bool extras>
__device__ __forceinline__ void sum_parts(const Terms& terms, const float* weights,
                                          SharedAddress column, float (&sum)[kElements<f32>]) {
    float before[kElements<f32>] = {};
#pragma unroll 1
    for (int i = 0; i < terms.count; ++i) {
        const uint4 v = load_shared(column + i * kColumn);
        if (i < terms.near) {
            accumulate<f32, extras>(v, extras ? weights[i] : 1.0f, sum);
        } else if (i < terms.near + terms.before) {
            accumulate<f32, false>(v, 1.0f, before);
        } else {
            accumulate<f32, false>(v, 1.0f, sum);
        }
        if (i + 1 != terms.near + terms.before) continue;
#pragma unroll
        for (int e = 0; e < kElements<f32>; ++e) sum[e] = __fadd_rn(before[e], sum[e]);
    }
}

/// Sum exactly `count` listed terms; see sum_terms.
template <int count, bool f32, bool extras, class Store>
__device__ __forceinline__ void sum_listed(const Terms& terms, const SumPlace& place, int row_bytes,
                                           const Store& store) {
    constexpr int kStages = kStagesOf<count>;
    const ColumnRing ring(place.columns, count, kStages);
    const uint8_t* from[count + 1];
#pragma unroll
    for (int i = 0; i < count; ++i) from[i] = place.list->row[i] + lane_id() * 16;
    const int own = lane_id() * 16;
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
        const SharedAddress to = ring.first + s * ring.column_bytes;
        if (s * kColumn + own < row_bytes) load_column<count>(from, s * kColumn, to);
        copy_async_commit();
    }
    const bool in_parts = terms.before > 1 && terms.near > 0;
    SharedAddress column = ring.first;
    for (int first = 0; first < row_bytes; first += kColumn) {
        copy_async_wait<kStages - 1>();
        if (first + own < row_bytes) {
            float sum[kElements<f32>] = {};
            if (in_parts) {
                sum_parts<f32, extras>(terms, place.list->weight, column, sum);
            } else {
                sum_column<count, f32, extras>(place.list->weight, column, sum);
            }
            store(first + own, sum, Constant<kBeganFirst<count, f32, extras>>());
            const int next = first + kStages * kColumn;
            if (next + own < row_bytes) load_column<count>(from, next, column);
        }
        copy_async_commit();
        column = ring.after(column);
    }
}

/// Sum the listed terms. `store(at, sum, from_first)` gets this lane's 16 bytes of each column,
/// `at` bytes into the row. The whole warp, which has met since the list was made.
template <bool f32, bool extras, class Store>
__device__ __forceinline__ void sum_terms(const Terms& terms, const SumPlace& place, int row_bytes,
                                          const Store& store) {
    with_count(terms.count,
               [&](auto count) { sum_listed<count, f32, extras>(terms, place, row_bytes, store); });
    __syncwarp();  // the list may be made anew
}

}  // namespace epcomm
