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

/// Ready for the next launch. One thread of the last block.
__device__ inline void collect_deck(const epcomm_cuda_world& world) {
    own_control(world)->dealt = 0;
}

}  // namespace epcomm
