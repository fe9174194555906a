// Moving a row's bytes from one place to several by 16-byte loads and stores. Enough loads of a
// warp are in flight that 16 warps keep an SM's share of the memory busy: a packed row of H = 7168
// takes two trips to memory, its scales come with the first. Nothing has to drain between two rows.
#pragma once

#include "pack_round.cuh"

namespace epcomm {

constexpr int kMoveUnroll = 7;  ///< 16-byte loads a lane has in flight

__device__ __forceinline__ uint8_t* shuffle_pointer(uint8_t* pointer, int lane) {
    return reinterpret_cast<uint8_t*>(
        __shfl_sync(kWarp, reinterpret_cast<unsigned long long>(pointer), lane));
}

/// Copy `bytes` (a multiple of 16) to the `to` of every lane in `lanes`. The whole warp.
__device__ __forceinline__ void move_row(const uint8_t* from, int bytes, unsigned lanes,
                                         uint8_t* to) {
    constexpr int kColumn = 32 * 16;
    for (int first = 0; first < bytes; first += kMoveUnroll * kColumn) {
        const int at = first + lane_id() * 16;
        uint4 v[kMoveUnroll];
#pragma unroll
        for (int u = 0; u < kMoveUnroll; ++u) {
            if (at + u * kColumn < bytes) v[u] = load_once(from + at + u * kColumn);
        }
        for (unsigned left = lanes; left != 0; left &= left - 1) {
            uint8_t* base = shuffle_pointer(to, __ffs(int(left)) - 1) + at;
#pragma unroll
            for (int u = 0; u < kMoveUnroll; ++u) {
                if (at + u * kColumn < bytes) store_once(base + u * kColumn, v[u]);
            }
        }
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

/// Where a row comes from and goes to, by lane.
struct Move {
    const uint8_t* rows;    ///< of the one source
    const uint32_t* words;  ///< its scales, if they are not made on the way
    unsigned lanes;
    uint8_t* to;
    uint8_t* scales_to;
};

/// `packing`: 0 rows as they are, 1 from BF16, 2 from float32. `bytes` are the source's;
/// `area` is this warp's in shared memory, for the scales. The whole warp.
template <int packing>
__device__ __forceinline__ void move_with_scales(const Move& move, int bytes, int scale_words,
                                                 bool power_of_two, uint32_t* area) {
    uint32_t held[kHeldWords];
    if constexpr (packing == 0) {
        load_words(held, move.words, scale_words);
        move_row(move.rows, bytes, move.lanes, move.to);
        store_words(held, move.words, scale_words, move.lanes, move.scales_to);
    } else {
        pack_and_move_row<packing == 2>(move.rows, bytes / (packing == 2 ? 4 : 2), power_of_two,
                                        move.lanes, move.to, area);
        load_words(held, area, scale_words);
        store_words(held, area, scale_words, move.lanes, move.scales_to);
        __syncwarp();
    }
}

}  // namespace epcomm
