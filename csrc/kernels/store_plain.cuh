// Role: store rows by 16-byte loads and stores, where there is no bulk copy engine. A warp takes
// one token at a time; a row's columns pass through registers.
#pragma once

#include "deal.cuh"
#include "quantize.cuh"
#include "targets.cuh"
#include "timeline.cuh"

namespace epcomm {

/// Rows as they are: 16 bytes a lane.
__device__ inline void copy_row(const epcomm_cuda_dispatch& call, const Target* targets,
                                const Copies& copies, const uint8_t* from) {
    for (int first = 0; first < call.row_in_bytes; first += 32 * 16) {
        const int at = first + lane_id() * 16;
        uint4 v = {};
        if (at < call.row_in_bytes) v = load_once(from + at);
        for (int i = 0; i < copies.count; ++i) {
            const int rank = __shfl_sync(kWarp, copies.rank, i);
            const int64_t row = __shfl_sync(kWarp, copies.row, i);
            if (at < call.row_in_bytes) {
                store_once(targets[rank].rows + row * call.row.row_bytes + at, v);
            }
        }
    }
}

/// Packed rows: 16 elements a lane; the row's scales are left in `scales`.
template <bool f32>
__device__ inline void pack_row(const epcomm_cuda_dispatch& call, const Target* targets,
                                const Copies& copies, const uint8_t* from, uint32_t* scales) {
    constexpr int kSize = f32 ? 4 : 2;
    const bool power_of_two = call.announcement.format == EPCOMM_FORMAT_FP8_UE8M0;
    const int elements = call.row_in_bytes / kSize;
    const PackLane mine;
    for (int start = 0; start < elements; start += kPackStep) {
        Raw8<f32> raw[2] = {};
        for (int c = 0; c < 2; ++c) {
            const int element = start + mine.chunk[c];
            for (int p = 0; p < (f32 ? 2 : 1) && element < elements; ++p) {
                raw[c].part[p] = load_once(from + int64_t(element) * kSize + 16 * p);
            }
        }
        const Packed16 packed = pack16(raw[0], raw[1], power_of_two);
        if (lane_id() % 8 == 0 && start + mine.chunk[0] < elements) {
            put_scale(scales, start / EPCOMM_LIMIT_tile + mine.tile, packed.scale, power_of_two);
        }
        for (int i = 0; i < copies.count; ++i) {
            const int rank = __shfl_sync(kWarp, copies.rank, i);
            const int64_t row = __shfl_sync(kWarp, copies.row, i);
            uint8_t* to = targets[rank].rows + row * call.row.row_bytes;
            for (int c = 0; c < 2; ++c) {
                const int element = start + mine.chunk[c];
                if (element < elements) {
                    *reinterpret_cast<uint2*>(to + element) = packed.codes[c];
                }
            }
        }
    }
    __syncwarp();
}

/// `scales`: this warp's area in shared memory, a row's scales.
template <int packing>
__device__ inline void store_rows_plain(const epcomm_cuda_dispatch& call, const Target* targets,
                                        uint32_t* scales) {
    Dealer dealer;
    while (true) {
        int token = lane_id() == 0 ? dealer.take(call.world, call.routes.num_tokens) : 0;
        token = __shfl_sync(kWarp, token, 0);
        if (token < 0) break;
        const Copies copies = copies_of(call.routes.dests, call.routes.max_dests, token);
        delay_row(call.world, token);
        count_item(call.world);
        store_labels(call, targets, copies, token);
        const auto* from = static_cast<const uint8_t*>(call.x) + int64_t(token) * call.row_in_bytes;
        if constexpr (packing != 0) {
            pack_row<packing == 2>(call, targets, copies, from, scales);
            store_scale_words(call, targets, copies, scales);
        } else {
            copy_row(call, targets, copies, from);
        }
        if (packing == 0 && call.scales != nullptr) {
            store_scale_words(call, targets, copies,
                              static_cast<const uint32_t*>(call.scales) +
                                  int64_t(token) * (call.row.scale_bytes / 4));
        }
        __syncwarp();
    }
}

}  // namespace epcomm
