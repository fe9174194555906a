// BF16 or float32 to FP8 E4M3, a tile of 128 at a time: 16 lanes hold a tile, 8 elements each.
//
// amax over the tile's finite elements, at least 1e-4; scale = amax / 448 and factor = 448 / amax
// by IEEE division; code = nearest-even, saturating, of x * factor; NaN and infinity become
// 0x7F with x's sign. The UE8M0 scale is the smallest power of two not below amax / 448.
#pragma once

#include <cuda_fp8.h>
#include <stdint.h>

#include "memory.cuh"

namespace epcomm {

/// 8 elements of a row, as they lie in memory.
template <bool f32>
struct Raw8 {
    uint4 part[f32 ? 2 : 1];
};

/// FP8 codes of 8 elements, and the tile's scale: float bits, or a biased exponent.
struct Packed8 {
    uint2 codes;
    uint32_t scale;
};

constexpr uint32_t kInfinityBits = 0x7F800000;

template <bool f32>
__device__ __forceinline__ void unpack8(const Raw8<f32>& raw, float (&x)[8]) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(&raw);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if constexpr (f32) {
            x[i] = __uint_as_float(words[i]);
        } else {
            const uint32_t pair = words[i / 2];
            x[i] = __uint_as_float(i % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
        }
    }
}

/// Bit pattern, as float32, of the largest magnitude; an infinity or NaN is larger than all.
template <bool f32>
__device__ __forceinline__ uint32_t largest_bits(const Raw8<f32>& raw) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(&raw);
    uint32_t largest = 0;
    if constexpr (f32) {
#pragma unroll
        for (int i = 0; i < 8; ++i) largest = max(largest, words[i] & 0x7fffffffu);
        return largest;
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) largest = __vmaxu2(largest, words[i] & 0x7fff7fffu);
        return max(largest << 16, largest & 0xffff0000u);
    }
}

/// The largest of the 16 lanes that share a tile.
__device__ __forceinline__ uint32_t largest_of_tile(uint32_t bits) {
    const unsigned group = 0xffffu << (threadIdx.x & 16);
#pragma unroll
    for (int step = 1; step < 16; step *= 2) {
        bits = max(bits, __shfl_xor_sync(group, bits, step));
    }
    return bits;
}

__device__ __forceinline__ uint32_t two_codes(float low, float high) {
    return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

/// Rare: the tile holds an infinity or a NaN.
template <bool f32>
__device__ __noinline__ uint32_t largest_finite_of_tile(Raw8<f32> raw) {
    float x[8];
    unpack8(raw, x);
    uint32_t largest = 0;
    for (int i = 0; i < 8; ++i) {
        const uint32_t bits = __float_as_uint(x[i]) & 0x7fffffffu;
        if (bits < kInfinityBits) largest = max(largest, bits);
    }
    return largest_of_tile(largest);
}

/// Pack the 8 elements of this lane; all 16 lanes of the tile must call. Lanes beyond the row
/// pass zeros.
template <bool f32>
__device__ __forceinline__ Packed8 pack8(const Raw8<f32>& raw, bool power_of_two) {
    uint32_t bits = largest_of_tile(largest_bits(raw));
    const bool special = bits >= kInfinityBits;
    if (special) bits = largest_finite_of_tile(raw);
    const float amax = fmaxf(__uint_as_float(bits), 1e-4f);
    const float scale = __fdiv_rn(amax, 448.0f);
    float factor;
    Packed8 packed;
    if (power_of_two) {
        const uint32_t exponent = (__float_as_uint(scale) + 0x7fffffu) >> 23;
        factor = __uint_as_float((254u - exponent) << 23);
        packed.scale = exponent;
    } else {
        factor = __fdiv_rn(448.0f, amax);
        packed.scale = __float_as_uint(scale);
    }
    float x[8];
    unpack8(raw, x);
    uint32_t codes[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        codes[i] = two_codes(__fmul_rn(x[2 * i], factor), __fmul_rn(x[2 * i + 1], factor));
    }
    packed.codes = make_uint2(codes[0] | codes[1] << 16, codes[2] | codes[3] << 16);
    if (special) {
        for (int i = 0; i < 8; ++i) {
            const uint32_t b = __float_as_uint(x[i]);
            if ((b & 0x7fffffffu) < kInfinityBits) continue;
            const uint32_t code = 0x7fu | (b >> 24 & 0x80u);
            uint32_t& word = i < 4 ? packed.codes.x : packed.codes.y;
            word = (word & ~(0xffu << 8 * (i & 3))) | code << 8 * (i & 3);
        }
    }
    return packed;
}

}  // namespace epcomm
