// Pseudo-random delays at the places where ranks and blocks meet, for tests: they bring out orders
// of events that are rare otherwise. Off (`delay_ns` = 0) they cost a branch that all threads take
// alike; no inner loop has one.
#pragma once

#include "wait.cuh"

namespace epcomm {

/// Where a warp may be held up.
enum DelayPlace {
    kDelayCounted = 1,    ///< layout: this block's tokens are counted, the blocks have not met
    kDelayAnnounce = 2,   ///< before this rank's announcement is written
    kDelayAnnounced = 3,  ///< all announcements are in, none is read
    kDelayRow = 4,        ///< between two tokens of a warp
    kDelayMoved = 5,      ///< a warp's work is done, its block has not met
    kDelaySignal = 6,     ///< all blocks are done, the peers do not know
    kDelayFinish = 7,     ///< the peers are done, the call is not counted as finished
    kDelayPlaced = 8,     ///< layout: this block's copies have their rows, the blocks have not met
};

/// A number that depends on every bit of `x` (the finalizer of splitmix64).
__device__ __forceinline__ uint64_t mix_bits(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

/// Hold the calling warp up, for at most `delay_ns`. Half of the warps at a place go on at once, so
/// that some are early while others are late; in a quarter of its calls a rank is not held up at
/// all. `salt` tells apart what passes a place more than once.
__device__ inline void delay(const epcomm_cuda_world& world, DelayPlace place, int salt = 0) {
    if (world.delay_ns == 0) return;
    const uint64_t epoch = load_relaxed(&own_control(world)->epoch.value);
    const uint64_t call = mix_bits(epoch * 64 + uint64_t(world.rank));
    if (call % 4 == 0) return;
    const uint64_t warp = (uint64_t(blockIdx.x) << 8) | uint64_t(warp_id());
    const uint64_t draw = mix_bits(call ^ (warp << 40) ^ (uint64_t(place) << 32) ^ uint32_t(salt));
    if (draw % 2 == 0) return;
    const uint64_t start = now_ns(), length = (draw >> 8) % uint64_t(world.delay_ns);
    while (now_ns() - start < length) __nanosleep(100);
}

/// Between tokens: one time in sixteen. The lanes that call it; the warp waits for them.
__device__ inline void delay_row(const epcomm_cuda_world& world, int token) {
    if (world.delay_ns == 0 || mix_bits(uint64_t(token)) % 16 != 0) return;
    delay(world, kDelayRow, token);
}

}  // namespace epcomm
