// Moving a row's bytes from one place to several by 16-byte loads and stores, with nothing that has
// to drain between two rows.
#pragma once

#include "pack_round.cuh"

namespace epcomm {

constexpr int kMoveUnroll = 7;  ///< columns of which a lane holds its part
constexpr int kMoveBatch = kMoveUnroll * kColumn;

__device__ __forceinline__ uint8_t* shuffle_pointer(uint8_t* pointer, int lane) {
    return reinterpret_cast<uint8_t*>(
        __shfl_sync(kWarp, reinterpret_cast<unsigned long long>(pointer), lane));
}

/// Store what lanes hold of a row of `bytes` (a multiple of 16) from byte `first` on, at the `to`
/// of every lane in `lanes`. The whole warp.
__device__ __forceinline__ void store_batch(const uint4 (&v)[kMoveUnroll], int first, int bytes,
                                            unsigned lanes, uint8_t* to) {
    const int at = first + lane_id() * 16;
    for (unsigned left = lanes; left != 0; left &= left - 1) {
        uint8_t* base = shuffle_pointer(to, __ffs(int(left)) - 1) + at;
#pragma unroll
        for (int u = 0; u < kMoveUnroll; ++u) {
            if (at + u * kColumn < bytes) store_once(base + u * kColumn, v[u]);
        }
    }
}

/// Copy a row. The whole warp.
__device__ __forceinline__ void move_row(const uint8_t* from, int bytes, unsigned lanes,
                                         uint8_t* to) {
    for (int first = 0; first < bytes; first += kMoveBatch) {
        const int at = first + lane_id() * 16;
        uint4 v[kMoveUnroll];
#pragma unroll
        for (int u = 0; u < kMoveUnroll; ++u) {
            if (at + u * kColumn < bytes) v[u] = load_once(from + at + u * kColumn);
        }
        store_batch(v, first, bytes, lanes, to);
    }
}

/// Pack a row of BF16 or float32 to FP8 on its way; its scales are left in `scales` (shared).
template <bool f32>
__device__ __forceinline__ void pack_and_move_row(const uint8_t* from, int elements,
                                                  bool power_of_two, unsigned lanes, uint8_t* to,
                                                  uint32_t* scales) {
    const PackLane mine;
    for (int first = 0; first < elements; first += kRoundElements<f32>) {
        Round<f32> round;
        round.load(from, first, elements, mine);
#pragma unroll
        for (int s = 0; s < kRoundSteps<f32>; ++s) {
            // One step after the other: these kernels have no registers to spare.
            const Raw16<f32> raw[1] = {round.steps[s]};
            Packed16 packed[1];
            pack_steps(raw, power_of_two, packed);
            const int start = first + s * kPackStep;
            const int tile = start / EPCOMM_LIMIT_tile + mine.tile;
            if (lane_id() % 8 == 0 && tile * EPCOMM_LIMIT_tile < elements) {
                put_scale(scales, tile, packed[0].scale, power_of_two);
            }
            for (unsigned left = lanes; left != 0; left &= left - 1) {
                uint8_t* base = shuffle_pointer(to, __ffs(int(left)) - 1) + start;
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    if (start + mine.chunk[c] < elements) {
                        *reinterpret_cast<uint2*>(base + mine.chunk[c]) = packed[0].codes[c];
                    }
                }
            }
        }
    }
    __syncwarp();
}

/// A lane's words of a row's scales, of the first so many.
constexpr int kHeldWords = 2;

/// Store `word` as word `w` of `count` at the `to` of every lane in `lanes`. The whole warp.
__device__ __forceinline__ void store_word(uint32_t word, int w, int count, unsigned lanes,
                                           uint8_t* to) {
    for (unsigned left = lanes; left != 0; left &= left - 1) {
        auto* base = reinterpret_cast<uint32_t*>(shuffle_pointer(to, __ffs(int(left)) - 1));
        if (w < count) base[w] = word;
    }
}

/// Store `held`, and copy what is behind it, of `count` words. The whole warp.
__device__ __forceinline__ void store_words(const uint32_t (&held)[kHeldWords],
                                            const uint32_t* from, int count, unsigned lanes,
                                            uint8_t* to) {
#pragma unroll
    for (int i = 0; i < kHeldWords; ++i) {
        if (i * 32 >= count) return;
        store_word(held[i], i * 32 + lane_id(), count, lanes, to);
    }
    for (int first = kHeldWords * 32; first < count; first += 32) {
        const int w = first + lane_id();
        const uint32_t word = w < count ? from[w] : 0;
        store_word(word, w, count, lanes, to);
    }
}

__device__ __forceinline__ void load_words(uint32_t (&held)[kHeldWords], const uint32_t* from,
                                           int count) {
#pragma unroll
    for (int i = 0; i < kHeldWords; ++i) {
        const int w = i * 32 + lane_id();
        held[i] = w < count ? from[w] : 0;
    }
}

}  // namespace epcomm
