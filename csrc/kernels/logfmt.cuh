// LogFMT codes of two tiles at a time: lanes 0 to 15 of a warp hold one, the others the next, 8
// consecutive elements each. What lies beyond the row is zero, which changes neither bounds nor
// codes of a partial tile.
//
// Every step is one IEEE float32 operation in the order of epcomm/formats/reference.py. Where the
// way differs, it is exact: integers become floats, and floats integers, by adding a power of two;
// tiles that may hold subnormals are lifted by 2^64.
#pragma once

#include "../protocol/limits.h"
#include "divide.cuh"
#include "memory.cuh"
#include "numbers.cuh"

namespace epcomm {
namespace logfmt {

constexpr int kTileLanes = 16;
constexpr int kHeld = 8;           ///< elements of a lane
constexpr int kStep = 32 * kHeld;  ///< elements of a warp
static_assert(kTileLanes * kHeld == EPCOMM_LIMIT_tile, "a tile is half a warp's elements");

/// 8 codes as a bit stream, the first element in the lowest bits.
template <int bits>
struct Codes {
    uint32_t word[(kHeld * bits + 31) / 32];
};

template <int bits>
constexpr float kLevels = float((1 << (bits - 1)) - 1);  ///< magnitude codes but zero

/// Coefficients of rising power; product and sum are rounded apart.
__device__ __forceinline__ float horner(float, float last) { return last; }
template <typename... Rest>
__device__ __forceinline__ float horner(float x, float first, Rest... rest) {
    return __fadd_rn(__fmul_rn(horner(x, rest...), x), first);
}

/// An integer below 2^22 in magnitude, as a float.
__device__ __forceinline__ float to_float(int i) {
    return __fsub_rn(__uint_as_float(__float_as_uint(numbers::round_magic) + uint32_t(i)),
                     numbers::round_magic);
}

/// log2 of a normal magnitude's bit pattern, plus `offset`. Zero and subnormals give some number
/// from -127 to -126, plus `offset`.
__device__ __forceinline__ float log2_normal(uint32_t magnitude, int offset) {
    using namespace numbers;
    const int e = int(magnitude - __float_as_uint(log2_split)) >> 23;
    const float f = __fsub_rn(__uint_as_float(magnitude - (uint32_t(e) << 23)), 1.0f);
    const float p = horner(f, log2_0, log2_1, log2_2, log2_3, log2_4, log2_5, log2_6);
    return __fadd_rn(to_float(e + offset), __fmul_rn(p, f));
}

/// log2 of any magnitude: a subnormal is its bit pattern times 2^-149.
__device__ __forceinline__ float log2_of(uint32_t magnitude) {
    const bool subnormal = magnitude < 0x00800000u;
    const uint32_t normal = subnormal ? __float_as_uint(__uint2float_rn(magnitude)) : magnitude;
    return log2_normal(normal, subnormal ? -149 : 0);
}

/// Towards minus infinity (plus infinity with `up`) to a BF16 value.
__device__ __forceinline__ float to_bf16(float x, bool up) {
    const uint32_t flip = up ? 0x80000000u : 0;
    const uint32_t bits = __float_as_uint(x) ^ flip;
    const uint32_t away = int(bits) < 0 ? 0xffffu : 0;
    return __uint_as_float(((bits + away) & 0xffff0000u) ^ flip);
}

/// What a tile is coded with.
struct Tile {
    float lo, hi;    ///< 0 in a tile of zeros
    float inverse;   ///< codes a unit of log2
    float constant;  ///< of the rounding
    bool finite;
};

/// The largest of what the tile's lanes of one parity hold.
__device__ __forceinline__ uint32_t largest_of_parity(uint32_t value) {
#pragma unroll
    for (int step = 2; step < kTileLanes; step *= 2) {
        value = max(value, __shfl_xor_sync(kWarp, value, step));
    }
    return value;
}

/// The whole warp. Even lanes see to the smallest nonzero magnitude, odd lanes to the largest, and
/// neighbours tell each other: half the shuffles, one logarithm and one division.
template <int bits>
__device__ __forceinline__ Tile measure(const float (&x)[kHeld]) {
    constexpr float kSteps = kLevels<bits> - 1.0f;
    const bool odd = lane_id() % 2 != 0;
    // The smallest is where the negated pattern is largest; a zero's stays 0.
    uint32_t largest = 0, negated = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        const uint32_t magnitude = __float_as_uint(x[i]) & 0x7fffffffu;
        largest = max(largest, magnitude);
        negated = max(negated, 0u - magnitude);
    }
    const uint32_t theirs = __shfl_xor_sync(kWarp, odd ? negated : largest, 1);
    const uint32_t found = largest_of_parity(max(odd ? largest : negated, theirs));
    const uint32_t top = __shfl_sync(kWarp, found, lane_id() | 1);

    const float bound = to_bf16(log2_of(odd ? found : 0u - found), odd);
    const float other = __shfl_xor_sync(kWarp, bound, 1);
    Tile tile;
    tile.finite = top < 0x7f800000u;
    tile.hi = odd ? bound : other;
    tile.lo = odd ? other : bound;
    const float lowest = to_bf16(__fsub_rn(tile.hi, numbers::logfmt_range), true);
    tile.lo = tile.lo > lowest ? tile.lo : lowest;
    const float spread = __fsub_rn(tile.hi, tile.lo);
    // Of a spread of 0 the one quotient is 0 and the other is not used.
    const float quotient = divide(odd ? spread : kSteps, odd ? kSteps : spread);
    const float others = __shfl_xor_sync(kWarp, quotient, 1);
    const float step = odd ? quotient : others;
    tile.inverse = spread > 0.0f ? (odd ? others : quotient) : 0.0f;
    tile.constant = __fsub_rn(numbers::linear_0, __fmul_rn(numbers::linear_1, step));
    if (top == 0) tile.lo = tile.hi = 0.0f;
    return tile;
}

/// What the row holds of a tile beside the codes: `lo` and `hi` as BF16.
__device__ __forceinline__ uint32_t metadata_of(const Tile& tile) {
    const uint32_t lo = __float_as_uint(tile.lo), hi = __float_as_uint(tile.hi);
    return tile.finite ? lo >> 16 | hi : 0x7fc07fc0u;
}

/// Codes of this lane's elements. The whole warp.
template <int bits>
__device__ __forceinline__ Codes<bits> encode(const float (&x)[kHeld], uint32_t* metadata) {
    constexpr uint32_t kSign = 1u << (bits - 1);
    constexpr float kWhole = 8388608.0f;  // 2^23: the last place is 1
    const Tile tile = measure<bits>(x);
    *metadata = metadata_of(tile);
    // Above this maximum, subnormals lie below the tile's range whatever their logarithm.
    const bool lifted = tile.hi <= -64.0f;
    const float lift = lifted ? 0x1p64f : 1.0f;
    const int offset = lifted ? -64 : 0;
    const float zero_below = __fsub_rn(tile.lo, 1.0f);
    Codes<bits> codes = {};
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        const uint32_t b = __float_as_uint(x[i]);
        const float magnitude = __fmul_rn(__uint_as_float(b & 0x7fffffffu), lift);
        const float log2 = log2_normal(__float_as_uint(magnitude), offset);
        float code = __fadd_rn(__fmul_rn(__fsub_rn(log2, tile.lo), tile.inverse), tile.constant);
        code = fminf(fmaxf(code, 1.0f), kLevels<bits>);
        // Rounded down, the sum is 2^23 and the code's whole part.
        const uint32_t whole = __float_as_uint(__fadd_rd(code, kWhole)) & (kSign - 1);
        const uint32_t k = (log2 < zero_below ? 0 : whole) | (b >> (32 - bits) & kSign);
        const int at = bits * i, shift = at % 32;
        codes.word[at / 32] |= k << shift;
        if (shift + bits > 32) codes.word[at / 32 + 1] |= k >> (32 - shift);
    }
    if (!tile.finite) codes = {};
    return codes;
}

/// What `encode` made, as numbers. All lanes of a tile bring the same metadata.
template <int bits>
__device__ __forceinline__ void decode(const Codes<bits>& codes, uint32_t metadata,
                                       float (&y)[kHeld]) {
    using namespace numbers;
    constexpr uint32_t kSign = 1u << (bits - 1);
    const float lo = __uint_as_float(metadata << 16);
    const float hi = __uint_as_float(metadata & 0xffff0000u);
    const float step = divide(__fsub_rn(hi, lo), kLevels<bits> - 1.0f);
    // 2^log2 is 2^(log2 - whole) * 2^whole; see the reference.
    const float clipped = fminf(fmaxf(lo, logfmt_exponent_min), logfmt_exponent_max);
    const float shifted_lo = __fadd_rn(clipped, round_magic);
    const float base = __fsub_rn(lo, __fsub_rn(shifted_lo, round_magic));
    // A shift by 23 leaves of the sum's bits the integer alone.
    const float scale = __uint_as_float((__float_as_uint(shifted_lo) + 127) << 23);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        const int at = bits * i, shift = at % 32;
        uint32_t code = codes.word[at / 32] >> shift;
        if (shift + bits > 32) code |= codes.word[at / 32 + 1] << (32 - shift);
        const uint32_t k = code & (kSign - 1);
        const float log2 = __fadd_rn(__fmul_rn(to_float(int(k) - 1), step), base);
        const float shifted = __fadd_rn(log2, round_magic);
        const float f = __fsub_rn(log2, __fsub_rn(shifted, round_magic));
        const float p = horner(f, exp2_0, exp2_1, exp2_2, exp2_3, exp2_4, exp2_5);
        const uint32_t power = __float_as_uint(p) + (__float_as_uint(shifted) << 23);
        const float value = fminf(__fmul_rn(__uint_as_float(power), scale), logfmt_largest);
        const uint32_t magnitude = k == 0 ? 0 : __float_as_uint(value);
        y[i] = __uint_as_float(magnitude | (code << (32 - bits) & 0x80000000u));
    }
    if (lo != lo || hi != hi) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) y[i] = __uint_as_float(0x7fc00000u);
    }
}

}  // namespace logfmt
}  // namespace epcomm
