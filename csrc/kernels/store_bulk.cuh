// Role: store rows by the bulk copy engine. A warp takes one token at a time: one load of the row
// into shared memory, packed in place if asked for, one store per copy; the next rows load while
// the stores drain.
#pragma once

#include "bulk.cuh"
#include "deal.cuh"
#include "quantize.cuh"
#include "targets.cuh"
#include "timeline.cuh"

namespace epcomm {

/// How a row is cut for shared memory. Rows that fit are one piece.
struct Pieces {
    int in_bytes;  ///< of a whole piece
    int out_bytes;
    int count;  ///< per row
};

/// Which piece a stage holds; token -1: no more come.
struct Item {
    int token;
    int piece;
};

/// A warp's ring of stages in shared memory.
struct Ring {
    uint8_t* first;  ///< stage 0
    int stage_bytes;
    int stages;
    uint64_t* loaded;  ///< a barrier a stage
    Item* items;       ///< what each stage holds
    uint32_t* scales;  ///< of the current row, when packing
};

#if EPCOMM_BULK

/// Lane 0: fill stages in order, each with the next piece of the next token.
struct Loader {
    const epcomm_cuda_dispatch& call;
    const Pieces& pieces;
    const Ring& ring;
    Dealer dealer;
    Item next;
    int slot;

    __device__ Loader(const epcomm_cuda_dispatch& c, const Pieces& p, const Ring& r)
        : call(c), pieces(p), ring(r), dealer(), next{0, p.count}, slot(0) {}

    __device__ void load() {
        if (next.piece == pieces.count) next = {dealer.take(call.world, call.routes.num_tokens), 0};
        ring.items[slot] = next;
        if (next.token >= 0) {
            const int offset = next.piece * pieces.in_bytes;
            const auto* row =
                static_cast<const uint8_t*>(call.x) + int64_t(next.token) * call.row_in_bytes;
            bulk_load(ring.first + slot * ring.stage_bytes, row + offset,
                      uint32_t(min(pieces.in_bytes, call.row_in_bytes - offset)),
                      ring.loaded + slot);
            ++next.piece;
        } else {
            next.piece = pieces.count;
        }
        slot = slot + 1 == ring.stages ? 0 : slot + 1;
    }
};

/// Pack the piece at `bytes` from BF16 or float32 to FP8, in place: the codes written by a step
/// lie below everything a later step reads. Scales go to `scales`.
template <bool f32>
__device__ __forceinline__ void pack_piece(uint8_t* bytes, uint32_t* scales, int elements,
                                           int first_tile, bool power_of_two) {
    constexpr int kSize = f32 ? 4 : 2;
    constexpr int kUnroll = f32 ? 1 : 2;  // steps whose reads are in flight together
    const PackLane mine;
    for (int at = 0; at < elements; at += kPackStep * kUnroll) {
        Raw8<f32> raw[kUnroll][2];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int element = at + u * kPackStep + mine.chunk[c];
                raw[u][c] = {};
                if (element < elements) {
                    raw[u][c] = *reinterpret_cast<const Raw8<f32>*>(bytes + element * kSize);
                }
            }
        }
        __syncwarp();
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const Packed16 packed = pack16(raw[u][0], raw[u][1], power_of_two);
            const int start = at + u * kPackStep;
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int element = start + mine.chunk[c];
                if (element < elements) {
                    *reinterpret_cast<uint2*>(bytes + element) = packed.codes[c];
                }
            }
            if (lane_id() % 8 == 0 && start + mine.chunk[0] < elements) {
                const int tile = first_tile + start / EPCOMM_LIMIT_tile + mine.tile;
                put_scale(scales, tile, packed.scale, power_of_two);
            }
        }
    }
    __syncwarp();
}

/// `packing`: 0 rows as they are, 1 from BF16, 2 from float32.
template <int packing>
__device__ inline void store_rows(const epcomm_cuda_dispatch& call, const Target* targets,
                                  const Pieces& pieces, const Ring& ring) {
    const int lane = lane_id();
    const bool power_of_two = call.announcement.format == EPCOMM_FORMAT_FP8_UE8M0;
    Loader loader(call, pieces, ring);
    // With one stage the next load waits for this item's stores, with more for the last one's.
    const int ahead = ring.stages > 1 ? ring.stages - 1 : 1;
    if (lane == 0) {
        for (int i = 0; i < ahead; ++i) loader.load();
    }
    __syncwarp();
    uint32_t parity = 0;
    int slot = 0;
    while (true) {
        const Item item = ring.items[slot];
        if (item.token < 0) break;
        uint8_t* const bytes = ring.first + slot * ring.stage_bytes;
        const Copies copies = copies_of(call.routes.dests, call.routes.max_dests, item.token);
        if (item.piece == 0) {
            delay_row(call.world, item.token);
            count_item(call.world);
            store_labels(call, targets, copies, item.token);
            if (packing == 0 && call.scales != nullptr) {
                store_scale_words(call, targets, copies,
                                  static_cast<const uint32_t*>(call.scales) +
                                      int64_t(item.token) * (call.row.scale_bytes / 4));
            }
        }
        barrier_wait(ring.loaded + slot, parity);
        const int offset = item.piece * pieces.out_bytes;
        if constexpr (packing != 0) {
            const int left = call.row_in_bytes - item.piece * pieces.in_bytes;
            pack_piece<packing == 2>(bytes, ring.scales,
                                     min(pieces.in_bytes, left) / (packing == 2 ? 4 : 2),
                                     offset / EPCOMM_LIMIT_tile, power_of_two);
            proxy_fence();
            __syncwarp();
        }
        const int length = min(pieces.out_bytes, call.row.row_bytes - offset);
        for (int i = 0; i < copies.count; ++i) {
            const int rank = __shfl_sync(kWarp, copies.rank, i);
            const int64_t row = __shfl_sync(kWarp, copies.row, i);
            if (lane == 0) {
                bulk_store(targets[rank].rows + row * call.row.row_bytes + offset, bytes,
                           uint32_t(length));
            }
        }
        if (packing != 0 && item.piece == pieces.count - 1) {
            store_scale_words(call, targets, copies, ring.scales);
        }
        if (lane == 0) {
            bulk_commit();
            if (ring.stages > 1) {
                bulk_wait_read<1>();
            } else {
                bulk_wait_read<0>();
            }
            loader.load();
        }
        __syncwarp();
        slot = slot + 1 == ring.stages ? 0 : slot + 1;
        parity ^= uint32_t(slot == 0);
    }
    if (lane == 0) {
        bulk_wait_written();
        proxy_fence();
    }
    __syncwarp();
}

#endif

}  // namespace epcomm
