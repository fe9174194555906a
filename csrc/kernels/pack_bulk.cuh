// Role: pack rows to FP8 on their way, and store them by the bulk copy engine. A warp takes one
// token at a time: it loads columns into registers, leaves their codes in shared memory, and stores
// a piece once per copy. The columns that come next, of the next token too, load while these are
// packed; and the next piece is packed while the last one's stores drain.
#pragma once

#include "pack_round.cuh"
#include "store_bulk.cuh"

namespace epcomm {

#if EPCOMM_BULK

/// Leave the codes of a round, whose first element is `first` of the row, at `codes`.
template <bool f32>
__device__ __forceinline__ void pack_round(const Round<f32>& round, bool power_of_two,
                                           uint8_t* codes, uint32_t* scales, int first,
                                           int elements, const PackLane& mine) {
    Packed16 packed[kRoundSteps<f32>];
    pack_steps(round.steps, power_of_two, packed);
#pragma unroll
    for (int s = 0; s < kRoundSteps<f32>; ++s) {
        const int start = s * kPackStep;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int at = start + mine.chunk[c];
            if (first + at < elements) {
                *reinterpret_cast<uint2*>(codes + at) = packed[s].codes[c];
            }
        }
        const int tile = (first + start) / EPCOMM_LIMIT_tile + mine.tile;
        if (lane_id() % 8 == 0 && tile * EPCOMM_LIMIT_tile < elements) {
            put_scale(scales, tile, packed[s].scale, power_of_two);
        }
    }
}

template <bool f32>
__device__ inline void pack_rows(const epcomm_cuda_dispatch& call, const Target* targets,
                                 const Pieces& pieces, const Ring& ring) {
    constexpr int kRound = kRoundElements<f32>;
    const bool power_of_two = call.announcement.format == EPCOMM_FORMAT_FP8_UE8M0;
    const int elements = call.row_in_bytes / (f32 ? 4 : 2);
    const PackLane mine;
    Dealer dealer;
    const auto deal = [&] {
        const int token = lane_id() == 0 ? dealer.take(call.world, call.routes.num_tokens) : 0;
        return __shfl_sync(kWarp, token, 0);
    };
    const auto row_of = [&](int token) {
        return static_cast<const uint8_t*>(call.x) + int64_t(token) * call.row_in_bytes;
    };
    int token = deal();
    Round<f32> round;
    round.load(row_of(token), 0, token < 0 ? 0 : elements, mine);
    int slot = 0;
    while (token >= 0) {
        const int next = deal();
        const Copies copies = copies_of(call.routes.dests, call.routes.max_dests, token);
        delay_row(call.world, token);
        count_item(call.world);
        store_labels(call, targets, copies, token);
        for (int offset = 0; offset < elements; offset += pieces.bytes) {
            const int length = min(pieces.bytes, elements - offset);
            uint8_t* const codes = ring.first + slot * ring.stage_bytes;
            wait_stage(ring);
            for (int at = 0; at < length; at += kRound) {
                const Round<f32> now = round;
                const int coming = offset + at + kRound;
                if (coming < elements) {
                    round.load(row_of(token), coming, elements, mine);
                } else {
                    round.load(row_of(next), 0, next < 0 ? 0 : elements, mine);
                }
                pack_round(now, power_of_two, codes + at, ring.scales, offset + at, elements, mine);
            }
            proxy_fence();
            __syncwarp();
            store_piece(call, targets, copies, codes, offset, length);
            slot = slot + 1 < ring.stages ? slot + 1 : 0;
        }
        store_scale_words(call, targets, copies, ring.scales);
        __syncwarp();
        token = next;
    }
    finish_stores();
}

#endif

}  // namespace epcomm
