// Role: pull the rows of tokens and sum them, column by column (columns.cuh). Columns of the next
// token are on their way while the last ones of a token are summed.
#pragma once

#include "columns.cuh"
#include "deal.cuh"
#include "timeline.cuh"

namespace epcomm {

constexpr int kPullStages = 2;  ///< columns of a warp; more were measured to change nothing

/// How the host laid out shared memory.
struct PullPlan {
    int copies;  ///< a column has room for
};

/// A token whose columns are on their way; token -1: no more come.
struct PullToken {
    int token;
    int count;  ///< copies, or -1: more than a column has room for
    int reserved[2];
    float weights[kPullCopies];
};

/// Every column in flight may belong to another token, and one more token may be at hand.
constexpr int kPullTokens = kPullStages + 2;

/// Shared memory of a warp: columns, then tokens.
__host__ __device__ inline int64_t pull_bytes(const PullPlan& plan) {
    return int64_t(kPullStages) * plan.copies * kColumn + kPullTokens * sizeof(PullToken);
}

/// Sends columns on their way, in order of tokens. The whole warp.
template <bool extras>
struct Puller {
    const epcomm_cuda_combine& call;
    const Offer* offers;
    const PullPlan& plan;
    ColumnRing ring;
    PullToken* tokens;
    Dealer dealer;
    int token;   ///< being loaded; -1: none is left
    int offset;  ///< of its next column, bytes
    int count;
    const uint8_t* from[kPullCopies];
    int coming;  ///< the token after it, whose list is on its way
    epcomm_cuda_dest coming_dest;
    int queued;  ///< place of the next token in the queue

    __device__ Puller(const epcomm_cuda_combine& c, const Offer* o, const PullPlan& p,
                      uint8_t* shared)
        : call(c),
          offers(o),
          plan(p),
          ring(shared_address(shared + warp_id() * pull_bytes(p)) + lane_id() * 16, p.copies,
               kPullStages),
          dealer(),
          token(0),
          offset(c.row_bytes),
          count(0),
          queued(0) {
        uint8_t* own = shared + warp_id() * pull_bytes(plan);
        tokens = reinterpret_cast<PullToken*>(own + kPullStages * ring.column_bytes);
        ask();
    }

    __device__ __forceinline__ void ask() {
        const int taken = lane_id() == 0 ? dealer.take(call.world, call.routes.num_tokens) : 0;
        coming = __shfl_sync(kWarp, taken, 0);
        coming_dest = {-1, -1, -1};
        if (coming >= 0 && lane_id() < call.routes.max_dests) {
            coming_dest = call.routes.dests[int64_t(coming) * call.routes.max_dests + lane_id()];
        }
    }

    __device__ __forceinline__ void next_token() {
        token = coming;
        offset = 0;
        PullToken& entry = tokens[queued];
        queued = queued + 1 == kPullTokens ? 0 : queued + 1;
        const bool goes = coming_dest.rank >= 0;
        count = __popc(__ballot_sync(kWarp, goes));
        const bool fits = count <= plan.copies;
        const uint8_t* row = nullptr;
        if (goes) {
            const Offer& offer = offers[coming_dest.rank];
            row = offer.rows + int64_t(coming_dest.row) * call.row_bytes;
            if (extras && fits) {
                entry.weights[lane_id()] =
                    offer.weights == nullptr ? 1.0f : offer.weights[coming_dest.row];
            }
        }
        if (!fits) count = -1;
        if (lane_id() == 0) {
            entry.token = token;
            entry.count = count;
        }
#pragma unroll
        for (int i = 0; i < kPullCopies; ++i) {
            from[i] = reinterpret_cast<const uint8_t*>(
                          __shfl_sync(kWarp, reinterpret_cast<unsigned long long>(row), i)) +
                      lane_id() * 16;
        }
        __syncwarp();
        if (token >= 0) ask();
    }

    /// The next column, whatever its token. `to`: this lane's place for it.
    __device__ __forceinline__ void load(SharedAddress to) {
        if (token >= 0 && offset >= call.row_bytes) next_token();
        if (token < 0) return;
        if (offset + lane_id() * 16 < call.row_bytes) {
            with_count(count, [&](auto copies) { load_column<copies>(from, offset, to); });
        }
        offset += count < 0 ? call.row_bytes : kColumn;
    }
};

/// All tokens, handed out to all warps of all blocks. One loop for all counts of copies: a loop
/// for each was a third slower, as the warps of a block then run different code. `many`: a token
/// may have more copies than a column has room for; the call for those costs registers.
template <bool f32, bool many, bool extras>
__device__ inline void pull_tokens(const epcomm_cuda_combine& call, const Offer* offers,
                                   const PullPlan& plan, uint8_t* shared) {
    Puller<extras> puller(call, offers, plan, shared);
    SharedAddress column = puller.ring.first;
    for (int s = 0; s < kPullStages; ++s) {
        puller.load(column);
        copy_async_commit();
        column = puller.ring.after(column);
    }
    for (int queue = 0;; queue = queue + 1 == kPullTokens ? 0 : queue + 1) {
        const PullToken& entry = puller.tokens[queue];
        const int token = entry.token, count = entry.count;
        if (token < 0) break;
        const Result result = result_of(call, token);
        delay_row(call.world, token);
        count_item(call.world);
        if (many && count < 0) {
            sum_token_plain<f32, extras>(
                call, offers, copies_of(call.routes.dests, call.routes.max_dests, token), token);
        }
        // A token with too many copies took one place in the ring, and nothing arrives there.
        const int end = count < 0 ? kColumn : call.row_bytes;
        for (int first = 0; first < end; first += kColumn) {
            const int at = first + lane_id() * 16;
            copy_async_wait<kPullStages - 1>();
            if (count >= 0 && at < call.row_bytes) {
                // One look at the count for this column and for the one that takes its place, if
                // that is of the same token.
                with_count(count, [&](auto copies) {
                    float sum[kElements<f32>] = {};
                    sum_column<copies, f32, extras>(entry.weights, column, sum);
                    finish_column<f32, extras, kBeganFirst<copies, f32, extras>>(result, at, sum);
                    if (at + kPullStages * kColumn < call.row_bytes) {
                        load_column<copies>(puller.from, puller.offset, column);
                    }
                });
            }
            // Groups count columns, so one is closed even where nothing is loaded.
            if (first + kPullStages * kColumn < end) {
                puller.offset += kColumn;
            } else {
                puller.load(column);
            }
            copy_async_commit();
            column = puller.ring.after(column);
        }
    }
}

}  // namespace epcomm
