// Rows on their way into a warp's shared memory by asynchronous copies, a batch at a time: the next
// row comes while one is stored, and before it is known where that goes.
#pragma once

#include "move.cuh"

namespace epcomm {

constexpr int kFeedDepth = 3;  ///< batches of a warp under way or at hand
constexpr int kFeedBytes = kFeedDepth * kMoveBatch;

/// The rows in `rows`, in their order. `source(r)` is row r's address, found by the whole warp.
template <class Source>
struct RowFeed {
    const Source& source;
    SharedAddress ring;  ///< this lane's 16 bytes of its first column
    int bytes;           ///< of a row
    unsigned rows;       ///< of which something has not been asked for
    int at = 0;          ///< in the first of them
    int taken = 0;       ///< place of the next batch taken

    __device__ __forceinline__ RowFeed(const Source& s, unsigned r, int b, const uint8_t* shared)
        : source(s), ring(shared_address(shared) + lane_id() * 16), bytes(b), rows(r) {
#pragma unroll
        for (int i = 0; i + 1 < kFeedDepth; ++i) ask(i);
    }

    /// Ask for the next batch, if there is one. Always closes a group, so that groups are batches.
    __device__ __forceinline__ void ask(int place) {
        if (rows != 0) {
            const int own = at + lane_id() * 16;
            const uint8_t* from = source(__ffs(int(rows)) - 1) + own;
            const SharedAddress to = ring + place * kMoveBatch;
#pragma unroll
            for (int u = 0; u < kMoveUnroll; ++u) {
                if (own + u * kColumn < bytes) copy_async(to + u * kColumn, from + u * kColumn);
            }
            at += kMoveBatch;
            if (at >= bytes) {
                rows &= rows - 1;
                at = 0;
            }
        }
        copy_async_commit();
    }

    /// The next batch, `first` bytes into its row.
    __device__ __forceinline__ void take(int first, uint4 (&v)[kMoveUnroll]) {
        ask(taken == 0 ? kFeedDepth - 1 : taken - 1);  // where the last one taken was
        copy_async_wait<kFeedDepth - 1>();
        const int own = first + lane_id() * 16;
        const SharedAddress from = ring + taken * kMoveBatch;
#pragma unroll
        for (int u = 0; u < kMoveUnroll; ++u) {
            if (own + u * kColumn < bytes) v[u] = load_shared(from + u * kColumn);
        }
        taken = taken + 1 == kFeedDepth ? 0 : taken + 1;
    }
};

/// Store the next row at the `to` of every lane in `lanes`. The whole warp.
template <class Source>
__device__ __forceinline__ void move_fed_row(RowFeed<Source>& feed, unsigned lanes, uint8_t* to) {
    for (int first = 0; first < feed.bytes; first += kMoveBatch) {
        uint4 v[kMoveUnroll];
        feed.take(first, v);
        store_batch(v, first, feed.bytes, lanes, to);
    }
}

}  // namespace epcomm
