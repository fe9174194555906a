// Role: store rows by 16-byte loads and stores, where there is no bulk copy engine. A warp takes
// one token at a time; a row's columns pass through registers.
#pragma once

#include "deal.cuh"
#include "move.cuh"
#include "targets.cuh"
#include "timeline.cuh"

namespace epcomm {

/// `scales`: this warp's area in shared memory, a row's scales.
template <int packing>
__device__ inline void store_rows_plain(const epcomm_cuda_dispatch& call, const Target* targets,
                                        uint32_t* scales) {
    const bool power_of_two = call.announcement.format == EPCOMM_FORMAT_FP8_UE8M0;
    const int elements = call.row_in_bytes / (packing == 2 ? 4 : 2);
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
        const unsigned lanes = copies.count < 32 ? (1u << copies.count) - 1 : kWarp;
        uint8_t* to = nullptr;
        if (lane_id() < copies.count) {
            to = targets[copies.rank].rows + int64_t(copies.row) * call.row.row_bytes;
        }
        if constexpr (packing != 0) {
            pack_and_move_row<packing == 2>(from, elements, power_of_two, lanes, to, scales);
            store_scale_words(call, targets, copies, scales);
        } else {
            move_row(from, call.row_in_bytes, lanes, to);
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
