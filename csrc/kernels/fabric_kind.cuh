// How the kernels of the two-hop path reach other nodes: they put triggers for proxy threads, or
// fill the NICs' send queues by themselves. A kernel is compiled for both; the launch picks.
#pragma once

#include "../fabric/ibgda.h"
#include "epcomm_cuda_rail.h"

namespace epcomm {

struct ByProxy {
    static __device__ const epcomm_fabric& fabric(const epcomm_cuda_rail& rail) {
        return rail.fabric;
    }
    /// The threads look for errors all the time.
    static __device__ void look(const epcomm_cuda_rail&, uint32_t) {}
};

struct ByNic {
    static __device__ const epcomm_ibgda& fabric(const epcomm_cuda_rail& rail) {
        return rail.ibgda;
    }
    /// Nobody looks for errors but who posts, and those who wait for another node: what a broken
    /// queue pair did not deliver may be what the other node waits for.
    static __device__ void look(const epcomm_cuda_rail& rail, uint32_t turn) {
        fabric::look(rail.ibgda, turn);
    }
};

/// Nonzero once the way to other nodes is broken.
template <class Kind>
__device__ __forceinline__ const uint32_t* fabric_failed(const epcomm_cuda_rail& rail) {
    return &Kind::fabric(rail).state->failed;
}

/// `wait_counter` for something that comes from another node.
template <class Kind>
__device__ inline bool wait_for_node(const epcomm_cuda_world& world, const epcomm_cuda_rail& rail,
                                     const uint64_t* counter, uint64_t expected, int node,
                                     const Waiting& what) {
    return wait_counter(world, counter, expected, rail.rail[node], what,
                        [&](uint32_t turn) { Kind::look(rail, turn); });
}

/// Call `with(ByProxy())` or `with(ByNic())`, as the rail says.
template <class With>
auto with_fabric_kind(const epcomm_cuda_rail& rail, const With& with) {
    return rail.fabric_kind == EPCOMM_FABRIC_KIND_IBGDA ? with(ByNic()) : with(ByProxy());
}

}  // namespace epcomm
