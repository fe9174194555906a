// Role: pull the rows of tokens and sum them. A warp keeps a ring of columns (512 bytes of every
// copy of a token) on their way into shared memory, by asynchronous 16-byte copies: the bytes in
// flight are bounded by shared memory, not by registers. A lane reads only what it copied, so the
// ring needs no barrier.
#pragma once

#include <type_traits>

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

/// `to`: an address in shared memory.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Wait until the oldest column of this lane's ring has arrived.
__device__ __forceinline__ void copy_async_wait_oldest() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPullStages - 1) : "memory");
}

/// Call `with` with a number of copies as a constant; 0 where a column has no room for them.
template <class With>
__device__ __forceinline__ void with_count(int count, const With& with) {
    static_assert(kPullCopies == 8, "one case a count");
    switch (count) {
        case 1: return with(std::integral_constant<int, 1>());
        case 2: return with(std::integral_constant<int, 2>());
        case 3: return with(std::integral_constant<int, 3>());
        case 4: return with(std::integral_constant<int, 4>());
        case 5: return with(std::integral_constant<int, 5>());
        case 6: return with(std::integral_constant<int, 6>());
        case 7: return with(std::integral_constant<int, 7>());
        case 8: return with(std::integral_constant<int, 8>());
        default: return with(std::integral_constant<int, 0>());
    }
}

/// Sends columns on their way, in order of tokens. The whole warp.
template <bool extras>
struct Puller {
    const epcomm_cuda_combine& call;
    const Offer* offers;
    const PullPlan& plan;
    uint32_t columns;  ///< this lane's 16 bytes of the first column, an address in shared memory
    PullToken* tokens;
    Dealer dealer;
    int token;   ///< being loaded; -1: none is left
    int offset;  ///< of its next column, bytes
    int count;
    const uint8_t* from[kPullCopies];
    int coming;  ///< the token after it, whose list is on its way
    epcomm_cuda_dest coming_dest;
    int column_bytes;  ///< of all copies
    int queued;        ///< place of the next token in the queue

    __device__ Puller(const epcomm_cuda_combine& c, const Offer* o, const PullPlan& p,
                      uint8_t* shared)
        : call(c),
          offers(o),
          plan(p),
          dealer(),
          token(0),
          offset(c.row_bytes),
          count(0),
          column_bytes(p.copies * kColumn),
          queued(0) {
        uint8_t* own = shared + warp_id() * pull_bytes(plan);
        columns = uint32_t(__cvta_generic_to_shared(own)) + lane_id() * 16;
        tokens = reinterpret_cast<PullToken*>(own + kPullStages * column_bytes);
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

    /// This lane's 16 bytes of `copies` copies, which is how many there are.
    template <int copies>
    __device__ __forceinline__ void load_copies(uint32_t to) {
#pragma unroll
        for (int i = 0; i < copies; ++i) copy_async(to + i * kColumn, from[i] + offset);
    }

    /// The next column, whatever its token. `to`: this lane's place for it.
    __device__ __forceinline__ void load(uint32_t to) {
        if (token >= 0 && offset >= call.row_bytes) next_token();
        if (token < 0) return;
        if (offset + lane_id() * 16 < call.row_bytes) {
            with_count(count, [&](auto copies) { load_copies<copies>(to); });
        }
        offset += count < 0 ? call.row_bytes : kColumn;
    }
};

__device__ __forceinline__ uint4 load_shared(uint32_t from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}

/// A column whose copies have come: this lane's 16 bytes of it.
struct Column {
    uint32_t from;  ///< address in shared memory
    int at;         ///< in the row, bytes
};

/// Sum exactly `count` copies, then load as many of the token's column after those under way, if it
/// has one: so one look at the count does for both.
template <int count, bool f32, bool extras>
__device__ __forceinline__ void sum_column(const PullToken& token, const Column& column,
                                           const Result& result, Puller<extras>& puller) {
    constexpr bool from_first = kFromFirst<f32, extras> && count > 0;
    uint4 v[count + 1];
#pragma unroll
    for (int i = 0; i < count; ++i) v[i] = load_shared(column.from + i * kColumn);
    float sum[kElements<f32>] = {};
    if (from_first) widen<f32>(v[0], sum);
#pragma unroll
    for (int i = from_first; i < count; ++i) {
        accumulate<f32, extras>(v[i], extras ? token.weights[i] : 1.0f, sum);
    }
    finish_column<f32, extras, from_first>(result, column.at, sum);
    if (column.at + kPullStages * kColumn < result.call.row_bytes) {
        puller.template load_copies<count>(column.from);
    }
}

/// All tokens, handed out to all warps of all blocks. One loop for all counts of copies: a loop
/// for each was a third slower, as the warps of a block then run different code. `many`: a token
/// may have more copies than a column has room for; the call for those costs registers.
template <bool f32, bool many, bool extras>
__device__ inline void pull_tokens(const epcomm_cuda_combine& call, const Offer* offers,
                                   const PullPlan& plan, uint8_t* shared) {
    Puller<extras> puller(call, offers, plan, shared);
    for (int s = 0; s < kPullStages; ++s) {
        puller.load(puller.columns + s * puller.column_bytes);
        copy_async_commit();
    }
    Column column = {puller.columns, 0};
    const uint32_t last = puller.columns + (kPullStages - 1) * puller.column_bytes;
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
            column.at = first + lane_id() * 16;
            copy_async_wait_oldest();
            if (count >= 0 && column.at < call.row_bytes) {
                with_count(count, [&](auto copies) {
                    sum_column<copies, f32, extras>(entry, column, result, puller);
                });
            }
            // Groups count columns, so one is closed even where nothing is loaded.
            if (first + kPullStages * kColumn < end) {
                puller.offset += kColumn;
            } else {
                puller.load(column.from);
            }
            copy_async_commit();
            column.from = column.from == last ? puller.columns : column.from + puller.column_bytes;
        }
    }
}

}  // namespace epcomm
