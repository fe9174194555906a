// Columns: 512 bytes of every row of a sum, on their way into shared memory by asynchronous 16-byte
// copies. A warp has a ring of them: the bytes in flight are bounded by shared memory, not by
// registers. A lane reads only what it copied, so the ring needs no barrier.
#pragma once

#include "reduce.cuh"

namespace epcomm {

/// Rows a column has room for; sums of more are made by plain loads.
constexpr int kPullCopies = 8;

/// Columns of a warp under way or at hand, as this lane has them: its 16 bytes of each row.
struct ColumnRing {
    SharedAddress first;
    SharedAddress last;
    int column_bytes;  ///< of all rows

    __device__ __forceinline__ ColumnRing(SharedAddress f, int rows, int columns)
        : first(f), last(f + (columns - 1) * rows * kColumn), column_bytes(rows * kColumn) {}

    __device__ __forceinline__ SharedAddress after(SharedAddress column) const {
        return column == last ? first : column + column_bytes;
    }
};

/// A number that a lambda's argument brings as a constant.
template <int number>
struct Constant {
    __host__ __device__ constexpr operator int() const { return number; }
};

/// Call `with` with a number of rows as a constant; 0 where a column has no room for them.
template <class With>
__device__ __forceinline__ void with_count(int count, const With& with) {
    static_assert(kPullCopies == 8, "one case a count");
    switch (count) {
        case 1: return with(Constant<1>());
        case 2: return with(Constant<2>());
        case 3: return with(Constant<3>());
        case 4: return with(Constant<4>());
        case 5: return with(Constant<5>());
        case 6: return with(Constant<6>());
        case 7: return with(Constant<7>());
        case 8: return with(Constant<8>());
        default: return with(Constant<0>());
    }
}

/// Whether a sum of `count` rows began with its first one, see kFromFirst.
template <int count, bool f32, bool extras>
constexpr bool kBeganFirst = kFromFirst<f32, extras> && count > 0;

/// Copy this lane's 16 bytes of `count` rows, `at` bytes into each. `from`: of the rows, for it.
template <int count, int room>
__device__ __forceinline__ void load_column(const uint8_t* const (&from)[room], int at,
                                            SharedAddress to) {
#pragma unroll
    for (int i = 0; i < count; ++i) copy_async(to + i * kColumn, from[i] + at);
}

/// Sum a column of exactly `count` rows into cleared `sum`.
template <int count, bool f32, bool extras>
__device__ __forceinline__ void sum_column(const float* weights, SharedAddress column,
                                           float (&sum)[kElements<f32>]) {
    constexpr bool from_first = kBeganFirst<count, f32, extras>;
    uint4 v[count + 1];
#pragma unroll
    for (int i = 0; i < count; ++i) v[i] = load_shared(column + i * kColumn);
    if (from_first) widen<f32>(v[0], sum);
#pragma unroll
    for (int i = from_first; i < count; ++i) {
        accumulate<f32, extras>(v[i], extras ? weights[i] : 1.0f, sum);
    }
}

}  // namespace epcomm
