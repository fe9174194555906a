// BF16 or float32 to FP8 E4M3, a tile of 128 at a time: 8 lanes hold a tile, 16 elements each.
//
// amax over the tile's finite elements, at least 1e-4; scale = amax / 448 and factor = 448 / amax
// by IEEE division; code = nearest-even, saturating, of x * factor; NaN and infinity become
// 0x7F with x's sign. The UE8M0 scale is the smallest power of two not below amax / 448.
#pragma once

#include <cuda_fp8.h>
#include <stdint.h>

#include "memory.cuh"
#include "numbers.cuh"

namespace epcomm {

/// 8 elements of a row, as they lie in memory.
template <bool f32>
struct Raw8 {
    uint4 part[f32 ? 2 : 1];
};

/// FP8 codes of a lane's 16 elements, and the tile's scale: float bits, or a biased exponent.
struct Packed16 {
    uint2 codes[2];
    uint32_t scale;
};

/// A lane's two chunks of 8 elements within the 512 a warp packs in a step. Chunks j and j + 8 of
/// a tile, so that 8 lanes touch 128 bytes in a row.
struct PackLane {
    int tile;      ///< of the step, 0..3
    int chunk[2];  ///< first element, from the start of the step

    __device__ PackLane() {
        const int lane = lane_id();
        tile = lane / 8;
        chunk[0] = tile * 128 + lane % 8 * 8;
        chunk[1] = chunk[0] + 64;
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

/// The largest of the 8 lanes that share a tile. The whole warp.
__device__ __forceinline__ uint32_t largest_of_tile(uint32_t bits) {
#pragma unroll
    for (int step = 1; step < 8; step *= 2) bits = max(bits, __shfl_xor_sync(kWarp, bits, step));
    return bits;
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

/// Pack this lane's 16 elements. The whole warp calls; what lies beyond the row is zero.
template <bool f32>
__device__ __forceinline__ Packed16 pack16(const Raw8<f32>& first, const Raw8<f32>& second,
                                           bool power_of_two) {
    uint32_t bits = largest_of_tile(max(largest_bits(first), largest_bits(second)));
    const bool special = __any_sync(kWarp, bits >= kInfinityBits);
    if (special) {
        bits = largest_of_tile(max(largest_finite_bits(first), largest_finite_bits(second)));
    }
    const float amax = fmaxf(__uint_as_float(bits), numbers::fp8_amax_floor);
    const float scale = __fdiv_rn(amax, numbers::fp8_max);
    float factor;
    Packed16 packed;
    if (power_of_two) {
        const uint32_t exponent = (__float_as_uint(scale) + 0x7fffffu) >> 23;
        factor = __uint_as_float((254u - exponent) << 23);
        packed.scale = exponent;
    } else {
        factor = __fdiv_rn(numbers::fp8_max, amax);
        packed.scale = __float_as_uint(scale);
    }
    float x[8], y[8];
    unpack8(first, x);
    unpack8(second, y);
    packed.codes[0] = codes_of(x, factor);
    packed.codes[1] = codes_of(y, factor);
    if (special) {
        mark_specials(x, packed.codes[0]);
        mark_specials(y, packed.codes[1]);
    }
    return packed;
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
