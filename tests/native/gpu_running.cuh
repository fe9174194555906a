// Nodes whose engines run, and writers' kernels beside them: what tests on a GPU have in common.
#pragma once

#include "gpu_world.cuh"

namespace gpu {

/// Where kernels count what went wrong; see World::result.
enum Counted { kDifferent = 0, kFailedCalls = 1, kFailedWaits = 2, kNumCounted = 3 };

__device__ inline void count(uint64_t* result, int which, uint64_t amount) {
    if (amount != 0) atomicAdd(reinterpret_cast<unsigned long long*>(&result[which]), amount);
}

/// Who waits for a peer looks at the own queue meanwhile, as the kernels do: nobody else learns
/// that it has failed.
__device__ inline bool wait_for(const Ibgda& fabric, Lane lane, const uint64_t* signal,
                                uint64_t expected) {
    fabric::FabricWait wait(fabric, fabric.timeout_ns);
    while (fabric::load_acquire(signal) < expected) {
        fabric::look(fabric, lane);
        if (!wait.again()) return false;
    }
    return true;
}

struct Results {
    uint64_t values[kNumCounted] = {};
    uint64_t different() const { return values[kDifferent]; }
    uint64_t failed_calls() const { return values[kFailedCalls]; }
    uint64_t failed_waits() const { return values[kFailedWaits]; }
};

inline void expect_good(const Results& seen) {
    CHECK_EQUAL(seen.different(), 0);
    CHECK_EQUAL(seen.failed_calls(), 0);
    CHECK_EQUAL(seen.failed_waits(), 0);
}

/// A world whose engines run, beside which these kernels may.
struct RunningWorld : World {
    template <class... Kernels>
    explicit RunningWorld(const Options& o, Kernels... kernels) : World(o) {
        load(kernels...);
        start();
    }
    Results results() {
        wait_for_writers();
        Results seen;
        read(result, seen.values, kNumCounted);
        return seen;
    }
    uint64_t* words(int32_t node, RegionId region) const {
        return reinterpret_cast<uint64_t*>(nodes[size_t(node)].regions[region]);
    }
};

inline FaultRule everywhere(Fault kind, uint64_t nanoseconds, uint32_t chance = kAlways / 4) {
    return {kind, kAny, kAny, 0, ~uint64_t(0), chance, 0, nanoseconds * kNanosecond};
}

}  // namespace gpu
