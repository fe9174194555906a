// Work requests as they lie in a send queue: one block each, put together in registers.
#pragma once

#include <string.h>

#include "mlx5.h"

namespace epcomm::mlx5 {

/// What every request starts with.
struct Header {
    uint32_t queue_pair;
    uint16_t index;  ///< of its first block
    uint8_t flags;   ///< ControlFlag
};

struct RemotePlace {
    uint64_t address;
    uint32_t key;
};

struct LocalPlace {
    uint64_t address;
    uint32_t key;
};

template <typename Segment>
EPCOMM_HD inline Unit as_unit(const Segment& segment) {
    static_assert(sizeof(Segment) == kUnitBytes, "a segment of one unit");
    Unit unit;
    memcpy(&unit, &segment, sizeof unit);
    return unit;
}

EPCOMM_HD inline Unit control_unit(const Header& header, Opcode opcode, uint32_t units) {
    Control control;
    control.operation = uint32_t(header.index) << 8 | opcode;
    control.queue_pair = header.queue_pair << 8 | units;
    control.signature = 0;
    control.stream[0] = control.stream[1] = 0;
    control.flags = header.flags;
    control.immediate = 0;
    return as_unit(control);
}

EPCOMM_HD inline Unit remote_unit(const RemotePlace& place) {
    return as_unit(Remote{place.address, place.key, 0});
}

EPCOMM_HD inline Unit data_unit(const LocalPlace& place, uint32_t bytes) {
    return as_unit(Data{bytes, place.key, place.address});
}

/// The peer's memory becomes a copy of this rank's. `bytes` is not 0.
EPCOMM_HD inline Block write_request(const Header& header, const RemotePlace& to,
                                     const LocalPlace& from, uint32_t bytes) {
    return {{control_unit(header, kRdmaWrite, 3), remote_unit(to), data_unit(from, bytes), {}}};
}

/// This rank's memory becomes a copy of the peer's. `bytes` is not 0.
EPCOMM_HD inline Block read_request(const Header& header, const RemotePlace& from,
                                    const LocalPlace& to, uint32_t bytes) {
    return {{control_unit(header, kRdmaRead, 3), remote_unit(from), data_unit(to, bytes), {}}};
}

/// The request carries its 1 to kMaxInline bytes itself.
EPCOMM_HD inline Block inline_write_request(const Header& header, const RemotePlace& to,
                                            const void* payload, uint32_t bytes) {
    Block block = {};
    const InlineHeader size = {bytes | kInline};
    const uint32_t units = 2 + (sizeof size + bytes + kUnitBytes - 1) / kUnitBytes;
    block.unit[0] = control_unit(header, kRdmaWrite, units);
    block.unit[1] = remote_unit(to);
    memcpy(&block.unit[2], &size, sizeof size);
    memcpy(reinterpret_cast<uint8_t*>(&block.unit[2]) + sizeof size, payload, bytes);
    return block;
}

/// The same of an aligned 64-bit word: what takes it sees it change at once.
EPCOMM_HD inline Block word_request(const Header& header, const RemotePlace& to, uint64_t value) {
    const uint32_t size = InlineHeader{sizeof value | kInline}.bytes.raw;
    return {{control_unit(header, kRdmaWrite, 3),
             remote_unit(to),
             {{size, uint32_t(value), uint32_t(value >> 32), 0}},
             {}}};
}

/// Adds to an aligned 64-bit word at the peer; its old value comes back to `landing`, 8 bytes that
/// must be registered even if nobody reads them.
EPCOMM_HD inline Block fetch_add_request(const Header& header, const RemotePlace& to,
                                         const LocalPlace& landing, uint64_t amount) {
    return {{control_unit(header, kAtomicFetchAdd, 4), remote_unit(to), as_unit(Atomic{amount, 0}),
             data_unit(landing, 8)}};
}

/// Stores `value` in a 64-bit word at the peer if it holds `expected`.
EPCOMM_HD inline Block compare_swap_request(const Header& header, const RemotePlace& to,
                                            const LocalPlace& landing, const Atomic& operands) {
    return {{control_unit(header, kAtomicCompareSwap, 4), remote_unit(to), as_unit(operands),
             data_unit(landing, 8)}};
}

/// Moves nothing; completes after everything before it.
EPCOMM_HD inline Block nop_request(const Header& header) {
    return {{control_unit(header, kNop, 1), {}, {}, {}}};
}

}  // namespace epcomm::mlx5
