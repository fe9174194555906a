// Rows to be packed are read round by round, so that the loads of one are under way while another
// is packed.
#pragma once

#include "quantize.cuh"

namespace epcomm {

/// Steps that a warp packs at a time.
template <bool f32>
constexpr int kRoundSteps = f32 ? 1 : 2;

template <bool f32>
constexpr int kRoundElements = kRoundSteps<f32> * kPackStep;

/// A lane's elements of one round.
template <bool f32>
struct Round {
    Raw16<f32> steps[kRoundSteps<f32>];

    /// From `row`, of `elements`; zero beyond it.
    __device__ __forceinline__ void load(const uint8_t* row, int first, int elements,
                                         const PackLane& mine) {
        constexpr int kSize = f32 ? 4 : 2;
#pragma unroll
        for (int s = 0; s < kRoundSteps<f32>; ++s) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int element = first + s * kPackStep + mine.chunk[c];
                Raw8<f32>& chunk = steps[s].chunk[c];
                chunk = {};
                if (element >= elements) continue;
#pragma unroll
                for (int p = 0; p < (f32 ? 2 : 1); ++p) {
                    chunk.part[p] = load_once(row + element * kSize + 16 * p);
                }
            }
        }
    }
};

}  // namespace epcomm
