// How the kernels of the two-hop path reach other nodes: they put triggers for proxy threads, or
// fill the NICs' send queues by themselves. A kernel is compiled for both; the launch picks.
#pragma once

#include "../fabric/ibgda.h"
#include "epcomm_cuda_rail.h"

namespace epcomm {

/// What a put of a kernel says.
struct Put {
    fabric::Lane lane;
    epcomm_fabric_place remote;
    epcomm_fabric_place local;
    uint64_t bytes;
    int32_t signal;
};

struct ByProxy {
    static constexpr bool kBounded = false;
    static __device__ const epcomm_fabric& fabric(const epcomm_cuda_rail& rail) {
        return rail.fabric;
    }
    /// One thread; false: the fabric failed.
    static __device__ __forceinline__ bool put_signal(const epcomm_cuda_rail& rail,
                                                      const Put& put) {
        return fabric::put_signal(rail.fabric, put.lane, put.remote, put.local, put.bytes,
                                  put.signal) != 0;
    }
    static __device__ __forceinline__ bool signal_add(const epcomm_cuda_rail& rail,
                                                      fabric::Lane lane, int32_t signal) {
        return fabric::signal_add(rail.fabric, lane, signal, 1) != 0;
    }
    /// The threads look for errors all the time.
    struct Look {
        __device__ Look(const epcomm_cuda_rail&, int) {}
        __device__ void operator()() {}
    };
};

struct ByNic {
    static constexpr bool kBounded = false;
    static __device__ const epcomm_ibgda& fabric(const epcomm_cuda_rail& rail) {
        return rail.ibgda;
    }
    /// Not inline: it is long, comes once for a chunk, and its registers are wanted elsewhere.
    static __device__ __noinline__ bool put_signal(const epcomm_cuda_rail& rail, Put put) {
        return fabric::put_signal(rail.ibgda, put.lane, put.remote, put.local, put.bytes,
                                  put.signal) != 0;
    }
    static __device__ __noinline__ bool signal_add(const epcomm_cuda_rail& rail, fabric::Lane lane,
                                                   int32_t signal) {
        return fabric::signal_add(rail.ibgda, lane, signal, 1) != 0;
    }
    /// Nobody looks for errors but who posts, and those who wait for another node: what a broken
    /// queue pair did not deliver to it may be what it waits for. One channel at a time.
    struct Look {
        const epcomm_ibgda& ibgda;
        fabric::Lane lane;

        __device__ Look(const epcomm_cuda_rail& rail, int node)
            : ibgda(rail.ibgda), lane{node, 0} {}
        __device__ void operator()() {
            fabric::look(ibgda, lane);
            lane.channel = lane.channel + 1 < ibgda.num_channels ? lane.channel + 1 : 0;
        }
    };
};

/// The same for staging that holds fewer chunks than a call has (csrc/protocol/chunk.h).
template <class Kind>
struct Bounded : Kind {
    static constexpr bool kBounded = true;
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
                        typename Kind::Look(rail, node));
}

/// Call `with(ByProxy())` or `with(ByNic())`, as the rail says.
template <class With>
auto with_fabric_kind(const epcomm_cuda_rail& rail, const With& with) {
    return rail.fabric_kind == EPCOMM_FABRIC_KIND_IBGDA ? with(ByNic()) : with(ByProxy());
}

/// The same for kernels that use staging.
template <class With>
auto with_staging_kind(const epcomm_cuda_rail& rail, const With& with) {
    return with_fabric_kind(rail, [&](auto kind) {
        using Kind = decltype(kind);
        return epcomm_is_bounded(&rail.chunking) ? with(Bounded<Kind>()) : with(Kind());
    });
}

}  // namespace epcomm
