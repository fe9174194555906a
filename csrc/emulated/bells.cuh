// One warp of the engine brings doorbells and records from host memory to the engine's own.
//
// MEMORY ORDER. A host thread stores requests, record, doorbell, then adds to the bell, each a
// release of what came before. The first lane acquires the bell and the warp meets; a lane acquires
// a doorbell before it reads that queue's record, so a record is never older than its doorbell. The
// engine's doorbell is released after its record: who acquires it finds record and requests.
#pragma once

#include "host_queues.h"
#include "slices.cuh"

namespace epcomm::emulated {

/// Between two looks at the bell. A look takes a trip over PCIe, 1 to 2 us, in which nothing else
/// of this warp is under way.
constexpr uint32_t kBellNs = 500;

/// By a warp: bring what has changed.
__device__ inline void bring_doorbells(const HostBells& bells) {
    const mlx5::WarpLanes group;
    for (uint32_t i = group.lane(); i < bells.num_queues; i += group.size()) {
        uint64_t* own = &bells.own_doorbells[i * kOwnStep];
        const uint64_t doorbell = fabric::load_acquire(&bells.doorbells[i]);
        if (doorbell == fabric::load_relaxed(own)) continue;
        bells.own_records[i * kOwnStep] = fabric::load_relaxed(&bells.records[i]);
        fabric::store_release(own, doorbell);
    }
    group.sync();
}

/// By a warp, until the block's control warps have ended. `Machine` hears of each look.
template <class Machine>
__device__ inline void carry_doorbells(const HostBells& bells, const SliceRing* ring) {
    const mlx5::WarpLanes group;
    uint64_t seen = 0;
    while (group.from_first(load_here(&ring->producers)) != 0) {
        uint64_t bell = seen;
        if (group.lane() == 0) {
            bell = fabric::load_acquire(bells.bell);
            Machine::looked_at_bell();
        }
        bell = group.from_first(bell);
        group.sync();
        if (bell != seen) bring_doorbells(bells);
        seen = bell;
        __nanosleep(kBellNs);
    }
}

}  // namespace epcomm::emulated
