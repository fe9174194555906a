// Role: pull the rows of a token from the ranks that hold them and sum them in order of (rank,
// choice) in float32. A warp takes one token at a time; all copies of a column are in flight
// together. No multiply-add is contracted: the bits are those of the CPU back end.
#pragma once

#include <cuda_bf16.h>

#include "targets.cuh"

namespace epcomm {

/// Addresses of what one rank offers to be summed.
struct Offer {
    const uint8_t* rows;
    const float* weights;       ///< one a row, or null
    const float* topk_weights;  ///< K or 1 a row, if they travel back
};

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

/// Nearest even; every NaN becomes 0x7FC0 with its sign.
__device__ __forceinline__ uint32_t to_bf16(float x) {
    const uint32_t bits = __float_as_uint(x);
    const uint32_t rounded = __bfloat16_as_ushort(__float2bfloat16_rn(x));
    return x != x ? (bits >> 16 & 0x8000u) | 0x7fc0u : rounded;
}

template <bool f32>
__device__ __forceinline__ uint4 narrow(const float (&x)[kElements<f32>]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (f32) {
            words[i] = __float_as_uint(x[i]);
        } else {
            words[i] = to_bf16(x[2 * i]) | to_bf16(x[2 * i + 1]) << 16;
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

/// Where a token's result goes and what is added to it, by byte offset of the column.
struct Result {
    uint8_t* out;
    const uint8_t* bias[2];  ///< or null
};

template <bool f32>
__device__ __forceinline__ void finish_column(const Result& result, int column,
                                              float (&sum)[kElements<f32>]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (result.bias[i] == nullptr) continue;
        accumulate<f32, false>(load_once(result.bias[i] + column), 1.0f, sum);
    }
    store_once(result.out + column, narrow<f32>(sum));
}

/// A token with exactly `count` copies; lane i < count holds copy i's address and weight.
template <int count, bool f32, bool weighted>
__device__ __forceinline__ void sum_copies(const uint8_t* row, float weight, int row_bytes,
                                           const Result& result) {
    // Columns in flight together: few copies leave room for more.
    constexpr int kUnroll = f32 ? 1 : count <= 2 ? 4 : count <= 4 ? 2 : 1;
    constexpr int kStride = 32 * 16;
    const uint8_t* from[count];
    float by[count];
#pragma unroll
    for (int i = 0; i < count; ++i) {
        from[i] = reinterpret_cast<const uint8_t*>(
            __shfl_sync(kWarp, reinterpret_cast<unsigned long long>(row), i));
        by[i] = weighted ? __shfl_sync(kWarp, weight, i) : 1.0f;
    }
    int at = lane_id() * 16;
    for (; at + (kUnroll - 1) * kStride < row_bytes; at += kUnroll * kStride) {
        uint4 v[kUnroll][count];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
            for (int i = 0; i < count; ++i) v[u][i] = load_once(from[i] + at + u * kStride);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            float sum[kElements<f32>] = {};
#pragma unroll
            for (int i = 0; i < count; ++i) accumulate<f32, weighted>(v[u][i], by[i], sum);
            finish_column<f32>(result, at + u * kStride, sum);
        }
    }
    for (; at < row_bytes; at += kStride) {
        uint4 v[count];
#pragma unroll
        for (int i = 0; i < count; ++i) v[i] = load_once(from[i] + at);
        float sum[kElements<f32>] = {};
#pragma unroll
        for (int i = 0; i < count; ++i) accumulate<f32, weighted>(v[i], by[i], sum);
        finish_column<f32>(result, at, sum);
    }
}

/// Any number of copies, four in flight.
template <bool f32, bool weighted>
__device__ __noinline__ void sum_many(const uint8_t* row, float weight, int count, int row_bytes,
                                      const Result result) {
    constexpr int kGroup = 4;
    for (int first = 0; first < row_bytes; first += 32 * 16) {
        const int at = first + lane_id() * 16;
        float sum[kElements<f32>] = {};
        for (int i = 0; i < count; i += kGroup) {
            uint4 v[kGroup];
            float by[kGroup];
#pragma unroll
            for (int j = 0; j < kGroup; ++j) {
                const auto* from = reinterpret_cast<const uint8_t*>(__shfl_sync(
                    kWarp, reinterpret_cast<unsigned long long>(row), (i + j) & 31));
                by[j] = __shfl_sync(kWarp, weight, (i + j) & 31);
                if (i + j < count && at < row_bytes) v[j] = load_once(from + at);
            }
#pragma unroll
            for (int j = 0; j < kGroup; ++j) {
                if (i + j < count) accumulate<f32, weighted>(v[j], by[j], sum);
            }
        }
        if (at >= row_bytes) continue;
        finish_column<f32>(result, at, sum);
    }
}

/// Sum one token's row.
template <bool f32, bool weighted>
__device__ __forceinline__ void sum_token(const epcomm_cuda_combine& call, const Offer* offers,
                                          const Copies& copies, int token) {
    const uint8_t* row = nullptr;
    float weight = 1.0f;
    if (lane_id() < copies.count) {
        const Offer& offer = offers[copies.rank];
        row = offer.rows + int64_t(copies.row) * call.row_bytes;
        if (weighted && offer.weights != nullptr) weight = offer.weights[copies.row];
    }
    const int64_t offset = int64_t(token) * call.row_bytes;
    Result result;
    result.out = static_cast<uint8_t*>(call.out) + offset;
    for (int i = 0; i < 2; ++i) {
        const auto* bias = static_cast<const uint8_t*>(call.bias[i]);
        result.bias[i] = bias == nullptr ? nullptr : bias + offset;
    }
    // Seven float32 addresses and weights and more would not fit into 80 registers.
    if (f32 && copies.count > 6) {
        return sum_many<f32, weighted>(row, weight, copies.count, call.row_bytes, result);
    }
    switch (copies.count) {
#define EPCOMM_SUM(n) \
    case n: return sum_copies<n, f32, weighted>(row, weight, call.row_bytes, result);
        EPCOMM_SUM(1)
        EPCOMM_SUM(2)
        EPCOMM_SUM(3)
        EPCOMM_SUM(4)
        EPCOMM_SUM(5)
        EPCOMM_SUM(6)
        EPCOMM_SUM(7)
        EPCOMM_SUM(8)
#undef EPCOMM_SUM
        default:
            return sum_many<f32, weighted>(row, weight, copies.count, call.row_bytes, result);
    }
}

/// All tokens, dealt over all warps of all blocks.
template <bool f32, bool weighted>
__device__ inline void sum_tokens(const epcomm_cuda_combine& call, const Offer* offers) {
    const int warps = int(gridDim.x * (blockDim.x >> 5));
    const int first = int(blockIdx.x * (blockDim.x >> 5)) + warp_id();
    for (int token = first; token < call.num_tokens; token += warps) {
        const Copies copies = copies_of(call.dests, call.max_dests, token);
        sum_token<f32, weighted>(call, offers, copies, token);
    }
}

}  // namespace epcomm
