// A trigger: one operation in 16 bytes.
//
//     word 0:  63 parity | 62..32 local offset / 16   | 31..0 remote offset / 16
//     word 1:  63 parity | 62..61 op | 60..41 bytes / 16 | 40..31 peer | 30..25 channel
//              24..9 signal | 8..6 local region | 5..3 remote region | 2..0 zero
//
// A signal_add has no places; its value is bits 62..0 of word 0.
//
// Parity: 1 in even laps of the ring, 0 in odd ones, so that memory of zeros is an empty ring.
// The consumer accepts a slot once both words have its lap's parity. Before lap k it has accepted
// both words of lap k - 1, with the other parity; so a word with the right parity was written in
// lap k. Hence any payload is legal, zero too, slots are never cleared, and a trigger of which only
// one word is visible yet is not taken for a whole one: no 16-byte atomicity is needed.
#pragma once

#include "../protocol/fabric.h"
#include "../protocol/host_device.h"

namespace epcomm::fabric {

/// An operation as producers state it. Offsets and bytes are multiples of EPCOMM_FABRIC_UNIT.
struct Command {
    epcomm_fabric_op op;
    int32_t peer;  ///< node number
    int32_t channel;
    int32_t signal;  ///< index in the peer's signals; ignored by a put
    epcomm_fabric_place local;
    epcomm_fabric_place remote;
    uint64_t bytes;  ///< at most the limit max_bytes
    uint64_t value;  ///< of a signal_add, below 2^63
};

constexpr uint64_t kParity = uint64_t(1) << 63;

/// The parity bit of a position's lap.
EPCOMM_HD inline uint64_t parity_of(uint64_t position, uint64_t num_slots) {
    return (position & num_slots) == 0 ? kParity : 0;
}

/// Whether the fields can hold the command.
EPCOMM_HD inline bool fits(const Command& command) {
    if (uint32_t(command.peer) >= EPCOMM_FABRIC_MAX_NODES ||
        uint32_t(command.channel) >= EPCOMM_FABRIC_MAX_CHANNELS ||
        uint32_t(command.signal) >= EPCOMM_FABRIC_MAX_SIGNALS) {
        return false;
    }
    if (command.op == EPCOMM_FABRIC_SIGNAL_ADD) return (command.value & kParity) == 0;
    const uint64_t low = command.local.offset | command.remote.offset | command.bytes;
    return (low & (EPCOMM_FABRIC_UNIT - 1)) == 0 && command.bytes <= EPCOMM_FABRIC_MAX_BYTES &&
           command.local.offset < EPCOMM_FABRIC_MAX_LOCAL &&
           command.remote.offset < EPCOMM_FABRIC_MAX_REMOTE &&
           uint32_t(command.local.region) < EPCOMM_FABRIC_MAX_REGIONS &&
           uint32_t(command.remote.region) < EPCOMM_FABRIC_MAX_REGIONS;
}

/// The command must fit.
EPCOMM_HD inline epcomm_trigger encode(const Command& command, uint64_t parity) {
    epcomm_trigger trigger;
    trigger.word[0] = parity | (command.op == EPCOMM_FABRIC_SIGNAL_ADD
                                    ? command.value
                                    : (command.local.offset / EPCOMM_FABRIC_UNIT) << 32 |
                                          command.remote.offset / EPCOMM_FABRIC_UNIT);
    trigger.word[1] = parity | uint64_t(command.op) << 61 |
                      (command.bytes / EPCOMM_FABRIC_UNIT) << 41 | uint64_t(command.peer) << 31 |
                      uint64_t(command.channel) << 25 | uint64_t(command.signal) << 9 |
                      uint64_t(command.local.region) << 6 | uint64_t(command.remote.region) << 3;
    return trigger;
}

inline Command decode(const epcomm_trigger& trigger) {
    const uint64_t first = trigger.word[0] & ~kParity, second = trigger.word[1];
    const auto field = [second](int shift, int bits) {
        return second >> shift & ((uint64_t(1) << bits) - 1);
    };
    Command command{};
    command.op = epcomm_fabric_op(field(61, 2));
    command.bytes = field(41, 20) * EPCOMM_FABRIC_UNIT;
    command.peer = int32_t(field(31, 10));
    command.channel = int32_t(field(25, 6));
    command.signal = int32_t(field(9, 16));
    if (command.op == EPCOMM_FABRIC_SIGNAL_ADD) {
        command.value = first;
        return command;
    }
    command.local.region = int32_t(field(6, 3));
    command.remote.region = int32_t(field(3, 3));
    command.local.offset = (first >> 32) * EPCOMM_FABRIC_UNIT;
    command.remote.offset = (first & 0xffffffffu) * EPCOMM_FABRIC_UNIT;
    return command;
}

}  // namespace epcomm::fabric
