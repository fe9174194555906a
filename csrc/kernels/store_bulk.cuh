// Role: store rows by the bulk copy engine. A warp takes one token at a time: one load of the row
// into shared memory, packed in place if asked for, one store per copy; the next rows load while
// the stores drain.
#pragma once

#include "bulk.cuh"
#include "quantize.cuh"
#include "targets.cuh"

namespace epcomm {

/// How a row is cut for shared memory. Rows that fit are one piece.
struct Pieces {
    int in_bytes;    ///< of a whole piece
    int out_bytes;
    int count;       ///< per row
};

/// A warp's ring of pieces in shared memory.
struct Ring {
    uint8_t* first;      ///< stage 0
    int stage_bytes;
    int stages;
    uint64_t* loaded;    ///< a barrier a stage
    uint32_t* scales;    ///< of the current row, when packing

    __device__ uint8_t* stage(int item) const { return first + item % stages * stage_bytes; }
    __device__ uint64_t* barrier(int item) const { return loaded + item % stages; }
    __device__ uint32_t parity(int item) const { return uint32_t(item / stages) & 1; }
};

#if EPCOMM_BULK

/// Pack the piece at `bytes` from BF16 or float32 to FP8, in place: the codes written by a
/// step lie below everything a later step reads. Scales go to `scales`.
template <bool f32>
__device__ __forceinline__ void pack_piece(uint8_t* bytes, uint32_t* scales, int elements,
                                           int first_tile, bool power_of_two) {
    constexpr int kStep = 256;              // elements a warp packs at once
    constexpr int kUnroll = f32 ? 2 : 4;    // steps whose reads are in flight together
    const int lane = lane_id();
    for (int at = 0; at < elements; at += kStep * kUnroll) {
        Raw8<f32> raw[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int element = at + u * kStep + lane * 8;
            if (element < elements) {
                raw[u] = *reinterpret_cast<const Raw8<f32>*>(bytes + element * (f32 ? 4 : 2));
            } else {
                raw[u] = {};
            }
        }
        __syncwarp();
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int element = at + u * kStep + lane * 8;
            const Packed8 packed = pack8(raw[u], power_of_two);
            if (element >= elements) continue;
            *reinterpret_cast<uint2*>(bytes + element) = packed.codes;
            if (lane % 16 != 0) continue;
            const int tile = first_tile + element / EPCOMM_LIMIT_tile;
            if (power_of_two) {
                reinterpret_cast<uint8_t*>(scales)[tile] = uint8_t(packed.scale);
            } else {
                scales[tile] = packed.scale;
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
    const int warps = int(gridDim.x * (blockDim.x >> 5));
    const int first = int(blockIdx.x * (blockDim.x >> 5)) + warp_id();
    const int mine = call.num_tokens > first ? (call.num_tokens - first + warps - 1) / warps : 0;
    const int items = mine * pieces.count;
    const bool power_of_two = call.row.scale_bytes > 0 &&
                              call.announcement.format == EPCOMM_FORMAT_FP8_UE8M0;

    auto load = [&](int item) {
        const int token = first + item / pieces.count * warps, piece = item % pieces.count;
        const int offset = piece * pieces.in_bytes;
        const int bytes = min(pieces.in_bytes, call.row_in_bytes - offset);
        const auto* row = static_cast<const uint8_t*>(call.x) + int64_t(token) * call.row_in_bytes;
        bulk_load(ring.stage(item), row + offset, uint32_t(bytes), ring.barrier(item));
    };

    // With one stage the next load waits for this item's stores, with more for the last one's.
    const int ahead = ring.stages > 1 ? ring.stages - 1 : 1;
    if (lane == 0) {
        for (int item = 0; item < min(ahead, items); ++item) load(item);
    }
    for (int item = 0; item < items; ++item) {
        const int token = first + item / pieces.count * warps, piece = item % pieces.count;
        uint8_t* bytes_here = ring.stage(item);
        const Copies copies = copies_of(call.dests, call.max_dests, token);
        if (piece == 0) store_labels(call, targets, copies, token);
        if (packing == 0 && piece == 0 && call.scales != nullptr) {
            store_scale_words(call, targets, copies,
                              static_cast<const uint32_t*>(call.scales) +
                                  int64_t(token) * (call.row.scale_bytes / 4));
        }
        barrier_wait(ring.barrier(item), ring.parity(item));
        const int in_offset = piece * pieces.in_bytes, offset = piece * pieces.out_bytes;
        if constexpr (packing != 0) {
            constexpr int kElement = packing == 2 ? 4 : 2;
            const int elements =
                min(pieces.in_bytes, call.row_in_bytes - in_offset) / kElement;
            pack_piece<packing == 2>(bytes_here, ring.scales, elements, offset / EPCOMM_LIMIT_tile,
                                     power_of_two);
            proxy_fence();
            __syncwarp();
        }
        const int bytes = min(pieces.out_bytes, call.row.row_bytes - offset);
        for (int i = 0; i < copies.count; ++i) {
            const int rank = __shfl_sync(kWarp, copies.rank, i);
            const int64_t row = __shfl_sync(kWarp, copies.row, i);
            if (lane == 0) {
                bulk_store(targets[rank].rows + row * call.row.row_bytes + offset, bytes_here,
                           uint32_t(bytes));
            }
        }
        if (lane == 0) {
            bulk_commit();
            if (item + ahead < items) {
                if (ring.stages > 1) {
                    bulk_wait_read<1>();
                } else {
                    bulk_wait_read<0>();
                }
                load(item + ahead);
            }
        }
        if (packing != 0 && piece == pieces.count - 1) {
            // The scales area is the warp's, one for all stages: done before the next packing.
            store_scale_words(call, targets, copies, ring.scales);
        }
        __syncwarp();
    }
    if (lane == 0) {
        bulk_wait_written();
        proxy_fence();
    }
    __syncwarp();
}

#endif

}  // namespace epcomm
