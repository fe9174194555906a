// Handing out tokens. A warp that is done takes the next token, so that SMs nearer to memory do
// more; which warp moves a token changes nothing in the result.
#pragma once

#include "delay.cuh"

namespace epcomm {

/// One lane's view of the tokens left to its warp. The next token is asked for a turn ahead, so
/// that nobody waits for the answer.
struct Dealer {
    int coming;

    /// The first tokens are the warps' by number.
    __device__ Dealer() : coming(int(blockIdx.x * (blockDim.x >> 5)) + warp_id()) {}

    /// The next of `count` tokens, or -1.
    __device__ int take(const epcomm_cuda_world& world, int count) {
        return take(&own_control(world)->dealt, count);
    }

    /// The next of `count` items of another deck.
    __device__ int take(uint32_t* dealt, int count) {
        const int token = coming;
        if (token >= count) return -1;
        const int warps = int(gridDim.x * (blockDim.x >> 5));
        coming = warps + int(atomicAdd(dealt, 1u));
        return token;
    }
};

/// For a deck that not every warp comes to, or not at once: nobody holds a token before it comes.
struct LateDealer {
    int coming;

    __device__ explicit LateDealer(uint32_t* dealt)
        : coming(lane_id() == 0 ? int(atomicAdd(dealt, 1u)) : 0) {}

    __device__ int take(uint32_t* dealt, int count) {
        const int token = coming;
        if (token >= count) return -1;
        coming = int(atomicAdd(dealt, 1u));
        return token;
    }
};

/// Consecutive items that are dealt together.
struct Range {
    int first;
    int count;
};

__device__ __forceinline__ int num_warps_of_call() { return int(gridDim.x * (blockDim.x >> 5)); }

/// Where warps get fewer items than so many each, items are dealt one by one: what is saved by
/// dealing a few at once is lost where some warps get a few more than others.
constexpr int kManyItems = 24;

/// How a deck is dealt: one by one at its beginning and end, a `group` at once between. What a warp
/// does for an item beside moving it takes as long for a few; alone go what others wait for at the
/// beginning, and what levels the warps' ends.
struct GroupedDeck {
    int items;
    int group;
    int alone;  ///< dealt one by one before all groups, which begin at multiples of `group`
    int groups;

    __device__ GroupedDeck(int all, int of, int before, int after) : items(all), group(of) {
        if (all < kManyItems * num_warps_of_call()) group = 1;
        alone = min((before + group - 1) / group * group, all);
        groups = max(all - alone - after, 0) / group;
    }

    __device__ __forceinline__ int takes() const { return items - groups * (group - 1); }

    /// What take `t` gets.
    __device__ __forceinline__ Range range(int t) const {
        if (t < alone) return {t, 1};
        if (t < alone + groups) return {alone + (t - alone) * group, group};
        return {t + groups * (group - 1), 1};
    }
};

/// Ready for the next launch. One thread of the last block.
__device__ inline void collect_deck(const epcomm_cuda_world& world) {
    own_control(world)->dealt = 0;
}

}  // namespace epcomm
