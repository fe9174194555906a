// Role: store rows by 16-byte loads and stores, where there is no bulk copy engine. A warp takes
// one token at a time; a row's columns pass through registers.
#pragma once

#include "quantize.cuh"
#include "targets.cuh"

namespace epcomm {

template <int packing>
__device__ __forceinline__ void store_row_plain(const epcomm_cuda_dispatch& call,
                                                const Target* targets, const Copies& copies,
                                                const uint8_t* from, uint32_t* scales) {
    constexpr int kIn = packing == 0 ? 16 : packing == 2 ? 32 : 16;  // bytes a lane reads
    constexpr int kOut = packing == 0 ? 16 : 8;                      // bytes a lane writes
    const int lane = lane_id();
    const bool power_of_two = call.announcement.format == EPCOMM_FORMAT_FP8_UE8M0;
    const int columns = call.row_in_bytes / kIn;
    for (int first = 0; first < columns; first += 32) {
        const int column = first + lane;
        Raw8<packing == 2> raw = {};
        if (column < columns) {
            raw.part[0] = load_once(from + int64_t(column) * kIn);
            if constexpr (packing == 2) raw.part[1] = load_once(from + int64_t(column) * kIn + 16);
        }
        Packed8 packed = {};
        if constexpr (packing != 0) {
            packed = pack8(raw, power_of_two);
            if (lane % 16 == 0 && column < columns) {
                const int tile = column / 16;
                if (power_of_two) {
                    reinterpret_cast<uint8_t*>(scales)[tile] = uint8_t(packed.scale);
                } else {
                    scales[tile] = packed.scale;
                }
            }
        }
        for (int i = 0; i < copies.count; ++i) {
            const int rank = __shfl_sync(kWarp, copies.rank, i);
            const int64_t row = __shfl_sync(kWarp, copies.row, i);
            if (column >= columns) continue;
            uint8_t* to = targets[rank].rows + row * call.row.row_bytes + int64_t(column) * kOut;
            if constexpr (packing == 0) {
                store_once(to, raw.part[0]);
            } else {
                *reinterpret_cast<uint2*>(to) = packed.codes;
            }
        }
    }
    __syncwarp();
}

/// `scales`: this warp's area in shared memory, a row's scales.
template <int packing>
__device__ inline void store_rows_plain(const epcomm_cuda_dispatch& call, const Target* targets,
                                        uint32_t* scales) {
    const int warps = int(gridDim.x * (blockDim.x >> 5));
    const int first = int(blockIdx.x * (blockDim.x >> 5)) + warp_id();
    for (int token = first; token < call.num_tokens; token += warps) {
        const Copies copies = copies_of(call.dests, call.max_dests, token);
        if (copies.count == 0) continue;
        store_labels(call, targets, copies, token);
        const auto* from = static_cast<const uint8_t*>(call.x) + int64_t(token) * call.row_in_bytes;
        store_row_plain<packing>(call, targets, copies, from, scales);
        if (packing != 0) {
            store_scale_words(call, targets, copies, scales);
        } else if (call.scales != nullptr) {
            store_scale_words(call, targets, copies,
                              static_cast<const uint32_t*>(call.scales) +
                                  int64_t(token) * (call.row.scale_bytes / 4));
        }
        __syncwarp();
    }
}

}  // namespace epcomm
