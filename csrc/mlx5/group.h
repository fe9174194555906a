// Threads that serve one queue pair together: a thread on its own, or the lanes of a warp.
//
// Code that takes a group is called by all its lanes, with the same values where nothing else is
// said. What lane 0 alone stores, the others may read after `sync`.
#pragma once

#include <stdint.h>

#include "../protocol/host_device.h"

namespace epcomm::mlx5 {

/// A thread on its own. The others' interface, without anybody to ask.
struct OneThread {
    EPCOMM_HD static uint32_t lane() { return 0; }
    EPCOMM_HD static uint32_t size() { return 1; }
    EPCOMM_HD static void sync() {}
    /// Of another lane.
    template <typename T>
    EPCOMM_HD static T at(T value, uint32_t) {
        return value;
    }
    template <typename T>
    EPCOMM_HD static T from_first(T value) {
        return value;
    }
    /// Of the lane `distance` below; lanes that have none get their own.
    template <typename T>
    EPCOMM_HD static T from_below(T value, uint32_t) {
        return value;
    }
    /// A bit for each lane.
    EPCOMM_HD static uint32_t ballot(bool is_so) { return is_so; }
    /// The lanes with the same value.
    EPCOMM_HD static uint32_t alike(uint64_t) { return 1; }
};

// Also where a test's header stands for the device.
#if defined(__CUDACC__) || defined(EPCOMM_DEVICE_EMULATION)
/// The 32 threads of a converged warp.
struct WarpLanes {
    static constexpr unsigned kAll = 0xffffffffu;
    __device__ static uint32_t lane() { return threadIdx.x & 31; }
    __device__ static uint32_t size() { return 32; }
    __device__ static void sync() { __syncwarp(); }
    template <typename T>
    __device__ static T at(T value, uint32_t lane) {
        return __shfl_sync(kAll, value, int(lane));
    }
    template <typename T>
    __device__ static T from_first(T value) {
        return __shfl_sync(kAll, value, 0);
    }
    template <typename T>
    __device__ static T from_below(T value, uint32_t distance) {
        return __shfl_up_sync(kAll, value, distance);
    }
    __device__ static uint32_t ballot(bool is_so) { return __ballot_sync(kAll, is_so); }
    __device__ static uint32_t alike(uint64_t value) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 700
        return __match_any_sync(kAll, static_cast<unsigned long long>(value));
#endif
    }
};
#endif

/// Of the lowest bit; 32 if there is none.
EPCOMM_HD inline uint32_t lowest(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return bits == 0 ? 32 : uint32_t(__ffs(int(bits)) - 1);
#else
    return bits == 0 ? 32 : uint32_t(__builtin_ctz(bits));
#endif
}

EPCOMM_HD inline uint32_t highest(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return 31 - uint32_t(__clz(int(bits)));
#else
    return 31 - uint32_t(__builtin_clz(bits));
#endif
}

EPCOMM_HD inline uint32_t count_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return uint32_t(__popc(bits));
#else
    return uint32_t(__builtin_popcount(bits));
#endif
}

/// Bits of the lanes below one.
EPCOMM_HD inline uint32_t below(uint32_t lane) { return (1u << lane) - 1; }

/// How many lanes, from the first on, have it so.
template <class Group>
EPCOMM_HD inline uint32_t leading(Group group, bool is_so) {
    const uint32_t first_not = lowest(~group.ballot(is_so));
    return first_not < group.size() ? first_not : group.size();
}

/// The sum over the lanes below, for the first `count` lanes.
template <class Group, typename T>
EPCOMM_HD inline T sum_before(Group group, uint32_t count, T value) {
    T sum = value;
    EPCOMM_NO_UNROLL
    for (uint32_t distance = 1; distance < count; distance *= 2) {
        const T other = group.from_below(sum, distance);
        if (group.lane() >= distance) sum += other;
    }
    return sum - value;
}

/// The largest value of the lanes up to this one, for the first `count` lanes.
template <class Group, typename T>
EPCOMM_HD inline T largest_until(Group group, uint32_t count, T value) {
    EPCOMM_NO_UNROLL
    for (uint32_t distance = 1; distance < count; distance *= 2) {
        const T other = group.from_below(value, distance);
        if (group.lane() >= distance && other > value) value = other;
    }
    return value;
}

}  // namespace epcomm::mlx5
