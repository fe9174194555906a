// Handing out tokens. A warp that is done takes the next token, so that SMs nearer to memory do
// more; which warp moves a token changes nothing in the result.
#pragma once

#include "wait.cuh"

namespace epcomm {

/// One lane's view of the tokens left to its warp. The next token is asked for a turn ahead, so
/// that nobody waits for the answer.
struct Dealer {
    uint32_t* dealt;
    int count;   ///< tokens
    int warps;   ///< of the launch; the first tokens are theirs by number
    int coming;

    __device__ Dealer(const epcomm_cuda_world& world, int num_tokens)
        : dealt(&own_control(world)->dealt),
          count(num_tokens),
          warps(int(gridDim.x * (blockDim.x >> 5))),
          coming(int(blockIdx.x * (blockDim.x >> 5)) + warp_id()) {}

    /// The next token, or -1.
    __device__ int take() {
        const int token = coming;
        if (token >= count) return -1;
        coming = warps + int(atomicAdd(dealt, 1u));
        return token;
    }
};

/// Ready for the next launch. One thread of the last block.
__device__ inline void collect_deck(const epcomm_cuda_world& world) {
    own_control(world)->dealt = 0;
}

}  // namespace epcomm
