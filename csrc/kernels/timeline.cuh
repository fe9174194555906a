// Notes what warps do in the rank's timeline, if it has one.
//
// Without one a note costs a branch on a kernel parameter, which lies in constant memory and is the
// same for all threads; no note stands in a loop over the columns of a row. A template flag would
// save the branch and double the kernels, of which there are six for each fabric. What a note does
// is a call, so that its registers are not the kernel's; and what an open span must remember lies
// in shared memory, so that nothing is held for it meanwhile. A warp has two: its role, and what it
// does within it.
//
// Whoever notes has a place in its block's ring to itself until the ring has gone round.
#pragma once

#include "wait.cuh"

namespace epcomm {

/// Warps of a block, in any kernel that notes.
constexpr int kSpanWarps = 20;

/// Shorter waits for a credit are not noted: asking takes about as long.
constexpr uint64_t kLongCreditNs = 1000;

struct OpenSpan {
    uint64_t begin;  ///< 0: none
    int32_t chunk;   ///< of a role: items so far
    int16_t node;
    int16_t role;
};

/// A warp's spans that have begun.
struct OpenSpans {
    OpenSpan role;
    OpenSpan within;
};

__device__ __forceinline__ OpenSpans& open_spans() {
    __shared__ OpenSpans of_warps[kSpanWarps];
    return of_warps[warp_id()];
}

__device__ __forceinline__ bool has_timeline(const epcomm_cuda_world& world) {
    return world.timeline != nullptr;
}

/// What is done where there is a timeline.
struct Noting {
    static __device__ void write(const epcomm_cuda_world& world, const OpenSpan& open, int warp,
                                 int chunk, int items) {
        epcomm_cuda_timeline* timeline = world.timeline;
        const unsigned ring = blockIdx.x % timeline->num_blocks;
        auto* count = reinterpret_cast<unsigned long long*>(&timeline->counts[ring]);
        const uint64_t at = uint64_t(atomicAdd(count, 1ull)) & (timeline->capacity - 1);
        epcomm_cuda_span span;
        span.begin = open.begin;
        span.end = now_ns();
        // The call's; it is counted as finished after its last note.
        span.epoch = load_relaxed(&own_control(world)->epoch.value) + 1;
        span.role = open.role;
        span.block = int16_t(blockIdx.x);
        span.warp = int16_t(warp);
        span.node = open.node;
        span.chunk = chunk;
        span.items = items;
        timeline->spans[uint64_t(ring) * timeline->capacity + at] = span;
    }

    static __device__ __noinline__ void begin_role(int role) {
        // Where a warp begins, shared memory may hold anything.
        open_spans() = {{now_ns(), 0, -1, int16_t(role)}, {0, 0, 0, 0}};
    }

    static __device__ __noinline__ void end_role(const epcomm_cuda_world& world, int warp) {
        const OpenSpan open = open_spans().role;
        write(world, open, warp, -1, open.chunk);
    }

    static __device__ __noinline__ void begin_within(int role, int node, int chunk) {
        open_spans().within = {now_ns(), chunk, int16_t(node), int16_t(role)};
    }

    /// `least`: shorter ones are not worth a note.
    static __device__ __noinline__ void end_within(const epcomm_cuda_world& world, uint64_t least) {
        const OpenSpan open = open_spans().within;
        open_spans().within.begin = 0;
        if (open.begin == 0 || now_ns() - open.begin < least) return;
        write(world, open, warp_id(), open.chunk, 0);
    }

    /// Of all who look for a chunk, those who wait, and who reads its first record.
    static __device__ __noinline__ void begin_wait(const uint64_t* counter, uint64_t expected,
                                                   int node, int chunk, bool is_first) {
        if (is_first || load_acquire(counter) < expected) {
            begin_within(EPCOMM_CUDA_ROLE_WAIT, node, chunk);
        }
    }
};

/// A role begins. The warp.
__device__ __forceinline__ void begin_role(const epcomm_cuda_world& world, epcomm_cuda_role role) {
    if (has_timeline(world) && lane_id() == 0) Noting::begin_role(role);
}

/// One more token or record is done in the warp's role. The warp.
__device__ __forceinline__ void count_item(const epcomm_cuda_world& world) {
    if (has_timeline(world) && lane_id() == 0) ++open_spans().role.chunk;
}

/// The warp's role is over. The warp.
__device__ __forceinline__ void end_role(const epcomm_cuda_world& world) {
    if (has_timeline(world) && lane_id() == 0) Noting::end_role(world, warp_id());
}

/// A role of the whole block. The block; it is over when its first thread gets there.
__device__ __forceinline__ void begin_block_role(const epcomm_cuda_world& world,
                                                 epcomm_cuda_role role) {
    if (has_timeline(world) && threadIdx.x == 0) Noting::begin_role(role);
}
__device__ __forceinline__ void end_block_role(const epcomm_cuda_world& world) {
    if (has_timeline(world) && threadIdx.x == 0) Noting::end_role(world, -1);
}

/// Something within a role. One lane.
__device__ __forceinline__ void begin_within(const epcomm_cuda_world& world, epcomm_cuda_role what,
                                             int node, int chunk) {
    if (has_timeline(world)) Noting::begin_within(what, node, chunk);
}
__device__ __forceinline__ void end_within(const epcomm_cuda_world& world, uint64_t least = 0) {
    if (has_timeline(world)) Noting::end_within(world, least);
}

}  // namespace epcomm
