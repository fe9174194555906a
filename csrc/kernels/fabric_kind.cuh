// How the kernels of the two-hop path reach other nodes: they put triggers for proxy threads, or
// fill the NICs' send queues by themselves, with or without moving lanes off dead planes. A kernel
// is compiled for each; the launch picks.
#pragma once

#include "../fabric/planes.h"
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
    static constexpr bool kFewKernels = false;
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
    struct LookAround {
        __device__ explicit LookAround(const epcomm_cuda_rail&) {}
        __device__ void operator()() {}
    };
    static __device__ bool settle(const epcomm_cuda_rail&) { return true; }
};

struct ByNic {
    static constexpr bool kBounded = false;
    static constexpr bool kFewKernels = false;
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
    using LookAround = ByProxy::LookAround;
    static __device__ bool settle(const epcomm_cuda_rail&) { return true; }
};

/// As ByNic, and moves lanes off dead planes. A kind of its own: kernels that call what that takes
/// need more registers.
struct ByPlanes {
    static constexpr bool kBounded = false;
    static constexpr bool kFewKernels = true;
    static __device__ fabric::Planes fabric(const epcomm_cuda_rail& rail) {
        return fabric::Planes(rail.ibgda);
    }
    static __device__ __noinline__ bool put_signal(const epcomm_cuda_rail& rail, Put put) {
        return fabric::put_signal(fabric(rail), put.lane, put.remote, put.local, put.bytes,
                                  put.signal) != 0;
    }
    static __device__ __noinline__ bool signal_add(const epcomm_cuda_rail& rail, fabric::Lane lane,
                                                   int32_t signal) {
        return fabric::signal_add(fabric(rail), lane, signal, 1) != 0;
    }
    static __device__ __noinline__ void look(const epcomm_cuda_rail& rail, fabric::Lane lane) {
        fabric::look(fabric(rail), lane);
    }
    /// What another node waits for may have been lost with a plane here, and only this rank can
    /// send it again. Whoever waits may wait for that node, through others: looks at all queues.
    struct LookAround {
        const epcomm_cuda_rail& rail;
        fabric::Lane lane;

        __device__ explicit LookAround(const epcomm_cuda_rail& r) : rail(r), lane{0, 0} {}
        __device__ void operator()() {
            if (lane.peer != rail.ibgda.node) look(rail, lane);
            if (++lane.channel < rail.ibgda.num_channels) return;
            lane.channel = 0;
            lane.peer = lane.peer + 1 < rail.ibgda.num_nodes ? lane.peer + 1 : 0;
        }
    };
    struct Look : LookAround {
        __device__ Look(const epcomm_cuda_rail& r, int node) : LookAround(r) {
            LookAround::lane.peer = node;
        }
    };
    /// Wait until all that was put has arrived, by the whole block. What is lost is sent again by
    /// who looks, and after the kernel nobody does.
    static __device__ __noinline__ bool settle(const epcomm_cuda_rail& rail) {
        bool ok = true;
        for (int c = int(threadIdx.x); c < rail.ibgda.num_channels; c += int(blockDim.x)) {
            ok = fabric::flush(fabric(rail), c, rail.ibgda.timeout_ns) && ok;
        }
        return __syncthreads_and(ok);
    }
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

/// Call `with` with the kind that the rail asks for.
template <class With>
auto with_fabric_kind(const epcomm_cuda_rail& rail, const With& with) {
    if (rail.fabric_kind != EPCOMM_FABRIC_KIND_IBGDA) return with(ByProxy());
    return rail.ibgda.failover != 0 ? with(ByPlanes()) : with(ByNic());
}

/// The same for kernels that use staging.
template <class With>
auto with_staging_kind(const epcomm_cuda_rail& rail, const With& with) {
    return with_fabric_kind(rail, [&](auto kind) {
        using Kind = decltype(kind);
        return epcomm_is_bounded(&rail.chunking) ? with(Bounded<Kind>()) : with(Kind());
    });
}

/// Call `with` with every kind that a rail may ask for, until it returns an error.
template <class With>
int with_each_fabric_kind(const With& with) {
    int error = with(ByProxy());
    if (error == 0) error = with(ByNic());
    return error == 0 ? with(ByPlanes()) : error;
}

/// The same for kernels that use staging.
template <class With>
int with_each_staging_kind(const With& with) {
    const int error = with_each_fabric_kind(with);
    if (error != 0) return error;
    return with_each_fabric_kind([&](auto kind) { return with(Bounded<decltype(kind)>()); });
}

}  // namespace epcomm
