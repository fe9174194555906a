// Summing the rows of a token in order of (rank, choice) in float32. No multiply-add is
// contracted: the bits are those of the CPU back end.
#pragma once

#include "targets.cuh"

namespace epcomm {

/// Addresses of what one rank offers to be summed.
struct Offer {
    const uint8_t* rows;
    const float* weights;       ///< one a row, or null
    const float* topk_weights;  ///< K or 1 a row, if they travel back
};

/// Fill `offers[L]`; true if any rank's rows carry weights. The whole block.
__device__ inline bool find_offers(const epcomm_cuda_combine& call, uint64_t epoch, Offer* offers) {
    const epcomm_cuda_world& world = call.world;
    bool weighted = false;
    for (int l = int(threadIdx.x); l < world.num_local; l += int(blockDim.x)) {
        const epcomm_announcement* theirs = announcement_from(world, world.node_ranks[l], epoch);
        const uint8_t* window =
            world.windows[int64_t(l) * world.num_windows + theirs->window_serial];
        offers[l].rows = window + theirs->rows_offset;
        offers[l].weights = theirs->row_weights
                                ? reinterpret_cast<const float*>(window + theirs->weights_offset)
                                : nullptr;
        offers[l].topk_weights = reinterpret_cast<const float*>(window + theirs->topk_offset);
        weighted = weighted || theirs->row_weights;
    }
    return __syncthreads_or(weighted);
}

template <bool f32>
constexpr int kElements = f32 ? 4 : 8;  ///< of 16 bytes

template <bool f32>
__device__ __forceinline__ void widen(const uint4& v, float (&x)[kElements<f32>]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (f32) {
            x[i] = __uint_as_float(words[i]);
        } else {
            x[2 * i] = __uint_as_float(words[i] << 16);
            x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    }
}

/// Every NaN becomes 0x7FC0 with its sign; the conversion above makes them 0x7FFF.
__device__ inline uint32_t canonical_nans(uint32_t pair, float low, float high) {
    if (low != low) pair = (pair & 0xffff0000u) | (__float_as_uint(low) >> 16 & 0x8000u) | 0x7fc0u;
    if (high != high) {
        pair = (pair & 0x0000ffffu) | (__float_as_uint(high) & 0x80000000u) | 0x7fc00000u;
    }
    return pair;
}

/// `from_first`: for sums that began with a row and not with zero, see kFromFirst.
template <bool f32, bool from_first = false>
__device__ __forceinline__ uint4 narrow(const float (&x)[kElements<f32>]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (f32) {
            words[i] = __float_as_uint(x[i]);
        } else {
            words[i] = two_bf16(x[2 * i], x[2 * i + 1]);
            if (from_first) words[i] = add_bf16(words[i], 0);
        }
    }
    if constexpr (!f32) {
        // A NaN makes the sums one; so may infinities, which costs time only.
        const uint32_t all = add_bf16(add_bf16(words[0], words[1]), add_bf16(words[2], words[3]));
        if ((((all & 0x7fff7fffu) + 0x00010001u) & 0x80008000u) != 0) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                words[i] = canonical_nans(words[i], x[2 * i], x[2 * i + 1]);
            }
        }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

template <bool f32, bool weighted>
__device__ __forceinline__ void accumulate(const uint4& v, float weight,
                                           float (&sum)[kElements<f32>]) {
    float x[kElements<f32>];
    widen<f32>(v, x);
#pragma unroll
    for (int e = 0; e < kElements<f32>; ++e) {
        sum[e] = __fadd_rn(sum[e], weighted ? __fmul_rn(weight, x[e]) : x[e]);
    }
}

/// Whether a call needs the code with `extras`: weights of rows, which are 1 where there are none,
/// and biases. What most calls do without took a quarter of their instructions.
__device__ __forceinline__ bool has_extras(const epcomm_cuda_combine& call, bool weighted) {
    return weighted || call.bias[0] != nullptr || call.bias[1] != nullptr;
}

/// Whether a sum begins with its first row instead of zero. That makes a difference only to -0, and
/// sums of BF16 are never rounded to it; so +0 is added in the end, to two elements at once.
template <bool f32, bool extras>
constexpr bool kFromFirst = !f32 && !extras;

/// Where a token's result goes: the same place in `out` and in the biases.
struct Result {
    const epcomm_cuda_combine& call;
    int64_t offset;  ///< bytes
};

/// Add the biases and store the sums.
template <bool f32, bool extras, bool from_first = false>
__device__ __forceinline__ void finish_column(const Result& result, int column,
                                              float (&sum)[kElements<f32>]) {
    const int64_t at = result.offset + column;
    if constexpr (extras) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const auto* bias = static_cast<const uint8_t*>(result.call.bias[i]);
            if (bias != nullptr) accumulate<f32, false>(load_once(bias + at), 1.0f, sum);
        }
    }
    store_once(static_cast<uint8_t*>(result.call.out) + at, narrow<f32, from_first>(sum));
}

/// Any number of copies by plain loads, eight in flight; lane i holds copy i's address and weight.
template <bool f32, bool extras>
__device__ __noinline__ void sum_many(const uint8_t* row, float weight, int count, int row_bytes,
                                      const Result result) {
    constexpr int kGroup = 8;
    for (int first = 0; first < row_bytes; first += 32 * 16) {
        const int at = first + lane_id() * 16;
        float sum[kElements<f32>] = {};
        for (int i = 0; i < count; i += kGroup) {
            uint4 v[kGroup];
            float by[kGroup];
#pragma unroll
            for (int j = 0; j < kGroup; ++j) {
                const auto* from = reinterpret_cast<const uint8_t*>(
                    __shfl_sync(kWarp, reinterpret_cast<unsigned long long>(row), (i + j) & 31));
                by[j] = __shfl_sync(kWarp, weight, (i + j) & 31);
                if (i + j < count && at < row_bytes) v[j] = load_once(from + at);
            }
#pragma unroll
            for (int j = 0; j < kGroup; ++j) {
                if (i + j < count) accumulate<f32, extras>(v[j], by[j], sum);
            }
        }
        if (at >= row_bytes) continue;
        finish_column<f32, extras>(result, at, sum);
    }
}

__device__ __forceinline__ Result result_of(const epcomm_cuda_combine& call, int token) {
    return {call, int64_t(token) * call.row_bytes};
}

/// Sum one token's row.
template <bool f32, bool extras>
__device__ __forceinline__ void sum_token_plain(const epcomm_cuda_combine& call,
                                                const Offer* offers, const Copies& copies,
                                                int token) {
    const uint8_t* row = nullptr;
    float weight = 1.0f;
    if (lane_id() < copies.count) {
        const Offer& offer = offers[copies.rank];
        row = offer.rows + int64_t(copies.row) * call.row_bytes;
        if (extras && offer.weights != nullptr) weight = offer.weights[copies.row];
    }
    sum_many<f32, extras>(row, weight, copies.count, call.row_bytes, result_of(call, token));
}

}  // namespace epcomm
