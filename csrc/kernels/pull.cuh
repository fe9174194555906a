// Role: pull the rows of tokens and sum them. A warp keeps a ring of columns (512 bytes of every
// copy of a token) on their way into shared memory, by asynchronous 16-byte copies: the bytes in
// flight are bounded by shared memory, not by registers. A lane reads only what it copied, so the
// ring needs no barrier.
#pragma once

#include "deal.cuh"
#include "reduce.cuh"
#include "timeline.cuh"

namespace epcomm {

/// Copies a column has room for; tokens with more are summed by plain loads.
constexpr int kPullCopies = 8;
constexpr int kPullStages = 2;    ///< columns of a warp; more were measured to change nothing
constexpr int kColumn = 32 * 16;  ///< bytes a warp takes at once

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

__device__ __forceinline__ void copy_async(void* to, const void* from) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(to))),
        "l"(from)
        : "memory");
}

__device__ __forceinline__ void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Wait until the oldest column of this lane's ring has arrived.
__device__ __forceinline__ void copy_async_wait_oldest() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPullStages - 1) : "memory");
}

/// Sends columns on their way, in order of tokens. The whole warp.
template <bool weighted>
struct Puller {
    const epcomm_cuda_combine& call;
    const Offer* offers;
    const PullPlan& plan;
    uint8_t* columns;
    PullToken* tokens;
    Dealer dealer;
    int token;   ///< being loaded; -1: none is left
    int offset;  ///< of its next column, bytes
    int count;
    const uint8_t* from[kPullCopies];
    int coming;  ///< the token after it, whose list is on its way
    epcomm_cuda_dest coming_dest;
    int slot;
    int queued;  ///< place of the next token in the queue

    __device__ Puller(const epcomm_cuda_combine& c, const Offer* o, const PullPlan& p,
                      uint8_t* shared)
        : call(c),
          offers(o),
          plan(p),
          dealer(),
          token(0),
          offset(c.row_bytes),
          count(0),
          slot(0),
          queued(0) {
        columns = shared + warp_id() * pull_bytes(plan);
        tokens = reinterpret_cast<PullToken*>(columns + kPullStages * plan.copies * kColumn);
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
            if (weighted && fits) {
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

    /// The next column. Always closes a group, so that groups count columns.
    __device__ __forceinline__ void load() {
        if (token >= 0 && offset >= call.row_bytes) next_token();
        if (token >= 0) {
            uint8_t* to = columns + slot * plan.copies * kColumn + lane_id() * 16;
            if (offset + lane_id() * 16 < call.row_bytes) {
#pragma unroll
                for (int i = 0; i < kPullCopies; ++i) {
                    if (i < count) copy_async(to + i * kColumn, from[i] + offset);
                }
            }
            offset += count < 0 ? call.row_bytes : kColumn;
        }
        copy_async_commit();
        slot = slot + 1 == kPullStages ? 0 : slot + 1;
    }
};

/// Sum this lane's 16 bytes of exactly `count` copies.
template <int count, bool f32, bool weighted>
__device__ __forceinline__ void sum_column(const PullToken& token, const uint8_t* column, int at,
                                           const Result& result) {
    uint4 v[count];
#pragma unroll
    for (int i = 0; i < count; ++i) {
        v[i] = *reinterpret_cast<const uint4*>(column + i * kColumn);
    }
    float sum[kElements<f32>] = {};
#pragma unroll
    for (int i = 0; i < count; ++i) {
        accumulate<f32, weighted>(v[i], weighted ? token.weights[i] : 1.0f, sum);
    }
    finish_column<f32>(result, at, sum);
}

template <bool f32, bool weighted>
__device__ __forceinline__ void sum_any(const PullToken& token, int count, const uint8_t* column,
                                        int at, const Result& result) {
    static_assert(kPullCopies == 8, "one case a count");
    switch (count) {
#define EPCOMM_SUM(n) \
    case n: sum_column<n, f32, weighted>(token, column, at, result); break;
        EPCOMM_SUM(1)
        EPCOMM_SUM(2)
        EPCOMM_SUM(3)
        EPCOMM_SUM(4)
        EPCOMM_SUM(5)
        EPCOMM_SUM(6)
        EPCOMM_SUM(7)
        EPCOMM_SUM(8)
#undef EPCOMM_SUM
        default: {
            float nothing[kElements<f32>] = {};
            finish_column<f32>(result, at, nothing);
        }
    }
}

/// All tokens, handed out to all warps of all blocks. One loop for all counts of copies: a loop
/// for each was a third slower, as the warps of a block then run different code. `many`: a token
/// may have more copies than a column has room for; the call for those costs registers.
template <bool f32, bool many, bool weighted>
__device__ inline void pull_tokens(const epcomm_cuda_combine& call, const Offer* offers,
                                   const PullPlan& plan, uint8_t* shared) {
    Puller<weighted> puller(call, offers, plan, shared);
    for (int s = 0; s < kPullStages; ++s) puller.load();
    int slot = 0;
    for (int queue = 0;; queue = queue + 1 == kPullTokens ? 0 : queue + 1) {
        const PullToken& entry = puller.tokens[queue];
        const int token = entry.token, count = entry.count;
        if (token < 0) break;
        const Result result = result_of(call, token);
        delay_row(call.world, token);
        count_item(call.world);
        if (many && count < 0) {
            sum_token_plain<f32, weighted>(
                call, offers, copies_of(call.routes.dests, call.routes.max_dests, token), token);
        }
        // A token with too many copies took one place in the ring, and nothing arrives there.
        const int end = count < 0 ? kColumn : call.row_bytes;
        for (int first = 0; first < end; first += kColumn) {
            const int at = first + lane_id() * 16;
            copy_async_wait_oldest();
            if (count >= 0 && at < call.row_bytes) {
                const uint8_t* column =
                    puller.columns + slot * plan.copies * kColumn + lane_id() * 16;
                sum_any<f32, weighted>(entry, count, column, at, result);
            }
            puller.load();
            slot = slot + 1 == kPullStages ? 0 : slot + 1;
        }
    }
}

}  // namespace epcomm
