// Integers in network byte order, as types of their own: a field cannot be read or written without
// its conversion.
#pragma once

#include <stdint.h>

#include "../protocol/host_device.h"

namespace epcomm::mlx5 {

EPCOMM_HD inline uint16_t swap_bytes(uint16_t v) { return uint16_t(v << 8 | v >> 8); }

EPCOMM_HD inline uint32_t swap_bytes(uint32_t v) {
#ifdef __CUDA_ARCH__
    return __byte_perm(v, 0, 0x0123);
#else
    return __builtin_bswap32(v);
#endif
}

EPCOMM_HD inline uint64_t swap_bytes(uint64_t v) {
    return uint64_t(swap_bytes(uint32_t(v))) << 32 | swap_bytes(uint32_t(v >> 32));
}

/// An integer stored with its most significant byte first. Host and device are little-endian.
template <typename T>
struct BigEndian {
    T raw;

    BigEndian() = default;
    EPCOMM_HD BigEndian(T value) : raw(swap_bytes(value)) {}
    EPCOMM_HD operator T() const { return swap_bytes(raw); }
};

using Be16 = BigEndian<uint16_t>;
using Be32 = BigEndian<uint32_t>;
using Be64 = BigEndian<uint64_t>;

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "conversions are written for this order");
static_assert(sizeof(Be16) == 2 && sizeof(Be32) == 4 && sizeof(Be64) == 8, "no padding");

}  // namespace epcomm::mlx5
