// Role: store rows as they are by the bulk copy engine. A warp takes one token at a time: one load
// of the row into shared memory, one store per copy; the next rows load while the stores drain.
#pragma once

#include "bulk.cuh"
#include "deal.cuh"
#include "targets.cuh"
#include "timeline.cuh"

namespace epcomm {

/// How a row is cut for shared memory. Rows that fit are one piece.
struct Pieces {
    int bytes;  ///< of a whole piece
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
            const int offset = next.piece * pieces.bytes;
            const auto* row =
                static_cast<const uint8_t*>(call.x) + int64_t(next.token) * call.row_in_bytes;
            bulk_load(ring.first + slot * ring.stage_bytes, row + offset,
                      uint32_t(min(pieces.bytes, call.row_in_bytes - offset)), ring.loaded + slot);
            ++next.piece;
        } else {
            next.piece = pieces.count;
        }
        slot = slot + 1 == ring.stages ? 0 : slot + 1;
    }
};

/// Store `length` bytes of shared memory at `offset` of every copy's row, as a group of each lane's
/// that holds a copy. The warp.
__device__ __forceinline__ void store_piece(const epcomm_cuda_dispatch& call, const Target* targets,
                                            const Copies& copies, const uint8_t* bytes, int offset,
                                            int length) {
    if (lane_id() < copies.count) {
        const int64_t row = copies.row;
        bulk_store(targets[copies.rank].rows + row * call.row.row_bytes + offset, bytes,
                   uint32_t(length));
    }
    bulk_commit();
}

/// The stage that comes next is free again. The warp.
__device__ __forceinline__ void wait_stage(const Ring& ring) {
    if (ring.stages > 1) {
        bulk_wait_read<1>();
    } else {
        bulk_wait_read<0>();
    }
    __syncwarp();
}

/// All that this warp has stored is written.
__device__ __forceinline__ void finish_stores() {
    bulk_wait_written();
    proxy_fence();
    __syncwarp();
}

__device__ inline void store_rows(const epcomm_cuda_dispatch& call, const Target* targets,
                                  const Pieces& pieces, const Ring& ring) {
    Loader loader(call, pieces, ring);
    // With one stage the next load waits for this item's stores, with more for the last one's.
    const int ahead = ring.stages > 1 ? ring.stages - 1 : 1;
    if (lane_id() == 0) {
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
            if (call.scales != nullptr) {
                store_scale_words(call, targets, copies,
                                  static_cast<const uint32_t*>(call.scales) +
                                      int64_t(item.token) * (call.row.scale_bytes / 4));
            }
        }
        barrier_wait(ring.loaded + slot, parity);
        const int offset = item.piece * pieces.bytes;
        store_piece(call, targets, copies, bytes, offset,
                    min(pieces.bytes, call.row.row_bytes - offset));
        wait_stage(ring);
        if (lane_id() == 0) loader.load();
        __syncwarp();
        slot = slot + 1 == ring.stages ? 0 : slot + 1;
        parity ^= uint32_t(slot == 0);
    }
    finish_stores();
}

#endif

}  // namespace epcomm
