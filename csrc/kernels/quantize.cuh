// BF16 or float32 to FP8 E4M3, a tile of 128 at a time: 8 lanes hold a tile, 16 elements each.
//
// amax over the tile's finite elements, at least 1e-4; scale = amax / 448 and factor = 448 / amax
// by IEEE division; code = nearest-even, saturating, of x * factor; NaN and infinity become
// 0x7F with x's sign. The UE8M0 scale is the smallest power of two not below amax / 448.
#pragma once

#include <cuda_fp8.h>
#include <stdint.h>

#include "../protocol/limits.h"
#include "divide.cuh"
#include "memory.cuh"
#include "numbers.cuh"

namespace epcomm {

/// 8 elements of a row, as they lie in memory.
template <bool f32>
struct Raw8 {
    uint4 part[f32 ? 2 : 1];
};

/// A lane's 16 elements of a step.
template <bool f32>
struct Raw16 {
    Raw8<f32> chunk[2];
};

/// FP8 codes of a lane's 16 elements, and the tile's scale: float bits, or a biased exponent.
struct Packed16 {
    uint2 codes[2];
    uint32_t scale;
};

/// A lane's two chunks of 8 elements within the 512 a warp packs in a step. Chunks j and j + 8 of
/// a tile, so that 8 lanes touch 128 bytes in a row; lanes of odd tiles begin with the later one,
/// so that a half warp's codes lie in all banks of shared memory.
struct PackLane {
    int tile;      ///< of the step, 0..3
    int chunk[2];  ///< first element, from the start of the step

    __device__ PackLane() {
        const int lane = lane_id();
        tile = lane / 8;
        chunk[0] = tile * 128 + tile % 2 * 64 + lane % 8 * 8;
        chunk[1] = chunk[0] ^ 64;
    }
};

constexpr int kPackStep = 512;
constexpr uint32_t kInfinityBits = 0x7F800000;

template <bool f32>
__device__ __forceinline__ void unpack8(const Raw8<f32>& raw, float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if constexpr (f32) {
            const uint4& v = raw.part[i / 4];
            const uint32_t word = i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
            x[i] = __uint_as_float(word);
        } else {
            const uint4& v = raw.part[0];
            const uint32_t pair = i / 2 == 0 ? v.x : i / 2 == 1 ? v.y : i / 2 == 2 ? v.z : v.w;
            x[i] = __uint_as_float(i % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
        }
    }
}

/// Bit pattern, as float32, of the largest magnitude; an infinity or NaN is larger than all.
template <bool f32>
__device__ __forceinline__ uint32_t largest_bits(const Raw8<f32>& raw) {
    if constexpr (f32) {
        const uint4 a = raw.part[0], b = raw.part[1];
        constexpr uint32_t m = 0x7fffffffu;
        return max(max(max(a.x & m, a.y & m), max(a.z & m, a.w & m)),
                   max(max(b.x & m, b.y & m), max(b.z & m, b.w & m)));
    } else {
        const uint4 v = raw.part[0];
        constexpr uint32_t m = 0x7fff7fffu;
        const uint32_t pair = __vmaxu2(__vmaxu2(v.x & m, v.y & m), __vmaxu2(v.z & m, v.w & m));
        return max(pair << 16, pair & 0xffff0000u);
    }
}

/// Each step's largest of the 8 lanes that share a tile. The whole warp.
template <int steps>
__device__ __forceinline__ void largest_of_tiles(uint32_t (&bits)[steps]) {
#pragma unroll
    for (int step = 1; step < 8; step *= 2) {
#pragma unroll
        for (int s = 0; s < steps; ++s) {
            bits[s] = max(bits[s], __shfl_xor_sync(kWarp, bits[s], step));
        }
    }
}

template <bool f32>
__device__ inline uint32_t largest_finite_bits(const Raw8<f32>& raw) {
    float x[8];
    unpack8(raw, x);
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint32_t bits = __float_as_uint(x[i]) & 0x7fffffffu;
        largest = max(largest, bits < kInfinityBits ? bits : 0);
    }
    return largest;
}

__device__ __forceinline__ uint2 codes_of(const float (&x)[8], float factor) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 y = make_float2(__fmul_rn(x[2 * i], factor), __fmul_rn(x[2 * i + 1], factor));
        pairs[i] = __nv_cvt_float2_to_fp8x2(y, __NV_SATFINITE, __NV_E4M3);
    }
    return make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
}

/// Overwrite the codes of infinities and NaNs.
__device__ inline void mark_specials(const float (&x)[8], uint2& codes) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const uint32_t bits = __float_as_uint(x[i]);
        if ((bits & 0x7fffffffu) < kInfinityBits) continue;
        const int shift = 8 * (i % 4);
        uint32_t& word = i < 4 ? codes.x : codes.y;
        word = (word & ~(0xffu << shift)) | (0x7fu | (bits >> 24 & 0x80u)) << shift;
    }
}

/// What a tile is multiplied by, and what is kept of it.
struct TileScale {
    float factor;
    uint32_t kept;
};

/// `ordinary`: amax and both quotients are normal numbers far from either end.
template <bool ordinary>
__device__ __forceinline__ TileScale scale_of(uint32_t amax_bits, bool power_of_two) {
    const float amax = fmaxf(__uint_as_float(amax_bits), numbers::fp8_amax_floor);
    float scale, factor;
    if constexpr (ordinary) {
        scale = divide(amax, numbers::fp8_max, 1.0f / numbers::fp8_max);
        factor = divide(numbers::fp8_max, amax);
    } else {
        scale = __fdiv_rn(amax, numbers::fp8_max);
        factor = __fdiv_rn(numbers::fp8_max, amax);
    }
    const uint32_t exponent = (__float_as_uint(scale) + 0x7fffffu) >> 23;
    if (power_of_two) return {__uint_as_float((254u - exponent) << 23), exponent};
    return {factor, __float_as_uint(scale)};
}

/// Pack this lane's elements of several steps; what belongs to different steps goes on side by
/// side. The whole warp calls; what lies beyond the row is zero.
template <bool f32, int steps>
__device__ __forceinline__ void pack_steps(const Raw16<f32> (&raw)[steps], bool power_of_two,
                                           Packed16 (&packed)[steps]) {
    // 2^100: beyond it quotients may be subnormal.
    constexpr uint32_t kOrdinaryBits = 0x71800000;
    uint32_t bits[steps], largest = 0;
#pragma unroll
    for (int s = 0; s < steps; ++s) {
        bits[s] = max(largest_bits(raw[s].chunk[0]), largest_bits(raw[s].chunk[1]));
    }
    largest_of_tiles(bits);
#pragma unroll
    for (int s = 0; s < steps; ++s) largest = max(largest, bits[s]);
    const bool special = __any_sync(kWarp, largest > kOrdinaryBits);
    TileScale scales[steps];
    if (!special) {
#pragma unroll
        for (int s = 0; s < steps; ++s) scales[s] = scale_of<true>(bits[s], power_of_two);
    } else {
#pragma unroll
        for (int s = 0; s < steps; ++s) {
            bits[s] =
                max(largest_finite_bits(raw[s].chunk[0]), largest_finite_bits(raw[s].chunk[1]));
        }
        largest_of_tiles(bits);
#pragma unroll
        for (int s = 0; s < steps; ++s) scales[s] = scale_of<false>(bits[s], power_of_two);
    }
#pragma unroll
    for (int s = 0; s < steps; ++s) {
        packed[s].scale = scales[s].kept;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            float x[8];
            unpack8(raw[s].chunk[c], x);
            packed[s].codes[c] = codes_of(x, scales[s].factor);
            if (special) mark_specials(x, packed[s].codes[c]);
        }
    }
}

/// Leave a tile's scale in a row's scales.
__device__ __forceinline__ void put_scale(uint32_t* scales, int tile, uint32_t scale,
                                          bool power_of_two) {
    if (power_of_two) {
        reinterpret_cast<uint8_t*>(scales)[tile] = uint8_t(scale);
    } else {
        scales[tile] = scale;
    }
}

}  // namespace epcomm
