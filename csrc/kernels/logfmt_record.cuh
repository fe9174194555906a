// LogFMT rows in records: the codes of all tiles, then their metadata, without a gap. Tiles start
// on 16 bytes. Rows are multiples of 8 elements, so a lane holds 8 or none; 8 codes of 10 bits are
// 10 bytes, so behind a partial tile the metadata may lie between words.
#pragma once

#include "logfmt.cuh"

namespace epcomm {
namespace logfmt {

/// A row in a record.
struct Row {
    uint8_t* codes;
    int hidden;
    int code_bytes;

    __device__ __forceinline__ uint8_t* metadata_at(int element) const {
        return codes + code_bytes + element / EPCOMM_LIMIT_tile * 4;
    }
};

__device__ __forceinline__ bool on_word(const uint8_t* address) {
    return (reinterpret_cast<uintptr_t>(address) & 3) == 0;
}

/// Up to `bytes` of these words, where they may lie between words.
template <int n>
__device__ __forceinline__ void store_halves(uint8_t* to, const uint32_t (&words)[n], int bytes) {
#pragma unroll
    for (int i = 0; i < 2 * n; ++i) {
        if (2 * i >= bytes) break;
        reinterpret_cast<uint16_t*>(to)[i] = uint16_t(words[i / 2] >> (i % 2 * 16));
    }
}

/// A tile of 10-bit codes is 160 bytes. 8 lanes hold 80 of them in a row, 10 each; the first five
/// of these lanes get 16 each, to store them at once. The whole warp.
///
/// Counted in words of the 80 bytes, an even lane 2p of the eight holds words 5p to 5p + 2 (of the
/// last, its neighbour has the upper half), and the odd one 5p + 3 and 5p + 4. Any word is asked of
/// one lane, and the five words of place r in the chunks are of five different lanes.
__device__ __forceinline__ uint4 gather_chunk(const Codes<10>& codes) {
    const int self = opaque(lane_id()), lane = self % 8, pair = lane / 2, odd = lane % 2;
    const uint32_t first = __shfl_xor_sync(kWarp, codes.word[0], 1);
    const uint32_t word0 = odd ? codes.word[0] >> 16 | codes.word[1] << 16 : codes.word[0];
    const uint32_t word1 = odd ? codes.word[1] >> 16 | codes.word[2] << 16 : codes.word[1];
    const uint32_t word2 = codes.word[2] | first << 16;
    uint32_t chunk[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const int mine = (r - 5 * pair - 3 * odd) & 3;
        const uint32_t offered = mine == 0 ? word0 : mine == 1 ? word1 : word2;
        const int wanted = 4 * lane + r;
        const int from = 2 * wanted / 5;
        chunk[r] = __shfl_sync(kWarp, offered, self - lane + (from & 7));
    }
    return make_uint4(chunk[0], chunk[1], chunk[2], chunk[3]);
}

/// Encode the elements from `first` on (a multiple of kStep). The whole warp.
template <int bits>
__device__ __forceinline__ void store_step(const float (&x)[kHeld], int first, const Row& row) {
    uint32_t metadata;
    const Codes<bits> codes = encode<bits>(x, &metadata);
    const int lane = opaque(lane_id()), mine = first + lane * kHeld;
    if constexpr (bits == 8) {
        // 8 bytes a lane are 256 in a row for the warp.
        const uint2 words = make_uint2(codes.word[0], codes.word[1]);
        if (mine < row.hidden) *reinterpret_cast<uint2*>(row.codes + mine) = words;
    } else {
        const uint4 chunk = gather_chunk(codes);
        const int place = lane % 8;
        const int at = first / 8 * bits + lane / 8 * 80 + place * 16;
        if (place < 5 && at + 16 <= row.code_bytes) {
            store_once(row.codes + at, chunk);
        } else if (place < 5) {
            const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
            store_halves(row.codes + at, words, row.code_bytes - at);
        }
    }
    if (lane % kTileLanes == 0 && mine < row.hidden) {
        uint8_t* to = row.metadata_at(mine);
        if (bits == 8 || on_word(to)) {
            *reinterpret_cast<uint32_t*>(to) = metadata;
        } else {
            store_halves<1>(to, {metadata}, 4);
        }
    }
}

/// What a lane needs of a record for kHeld elements.
template <int bits>
struct Loaded {
    Codes<bits> codes;
    uint32_t metadata;
};

/// Load codes and metadata of the elements from `first` on; zeros beyond the row. The last word may
/// hold what follows the codes in the record.
template <int bits>
__device__ __forceinline__ Loaded<bits> load_step(int first, const Row& row) {
    Loaded<bits> loaded = {};
    const int lane = opaque(lane_id()), mine = first + lane * kHeld;
    if (mine >= row.hidden) return loaded;
    if constexpr (bits == 8) {
        const uint2 words = *reinterpret_cast<const uint2*>(row.codes + mine);
        loaded.codes.word[0] = words.x;
        loaded.codes.word[1] = words.y;
    } else {
        // Codes of an even lane start on a word, those of an odd one in the middle of a word.
        const bool odd = lane % 2 != 0;
        const auto* words =
            reinterpret_cast<const uint32_t*>(row.codes + mine / 8 * bits - (odd ? 2 : 0));
        const uint32_t a = words[0], b = words[1], c = words[2];
        loaded.codes.word[0] = odd ? a >> 16 | b << 16 : a;
        loaded.codes.word[1] = odd ? b >> 16 | c << 16 : b;
        loaded.codes.word[2] = odd ? c >> 16 : c;
    }
    const uint8_t* from = row.metadata_at(mine);
    if (bits == 8 || on_word(from)) {
        loaded.metadata = *reinterpret_cast<const uint32_t*>(from);
    } else {
        const auto* halves = reinterpret_cast<const uint16_t*>(from);
        loaded.metadata = halves[0] | uint32_t(halves[1]) << 16;
    }
    return loaded;
}

/// A float32 row has 4 elements in each of a lane's two columns: one tile a column. Pairs of lanes
/// hand each other theirs, so that a lane holds 8 in a row of one tile. The whole warp.
__device__ __forceinline__ void columns_to_step(const float (&column)[2][4], float (&x)[kHeld]) {
    const int lane = opaque(lane_id()), second = lane / kTileLanes, from = lane % kTileLanes * 2;
    const bool odd = lane % 2 != 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const float a = __shfl_sync(kWarp, odd ? column[1][e] : column[0][e], from + second);
        const float b = __shfl_sync(kWarp, odd ? column[0][e] : column[1][e], from + 1 - second);
        x[e] = second ? b : a;
        x[4 + e] = second ? a : b;
    }
}

/// The way back.
__device__ __forceinline__ void step_to_columns(const float (&x)[kHeld], float (&column)[2][4]) {
    const int lane = opaque(lane_id()), odd = lane % 2, from = lane / 2;
    const bool second = lane >= kTileLanes;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const float a = __shfl_sync(kWarp, second ? x[4 + e] : x[e], from + kTileLanes * odd);
        const float b = __shfl_sync(kWarp, second ? x[e] : x[4 + e], from + kTileLanes * (1 - odd));
        column[0][e] = odd ? b : a;
        column[1][e] = odd ? a : b;
    }
}

}  // namespace logfmt
}  // namespace epcomm
