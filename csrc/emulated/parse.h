// The one parser of work requests: from the bytes of a send queue to an operation, or to the reason
// why they are none.
//
// Strict. Real hardware's set of checks is not public; this one refuses whatever epcomm would never
// write on purpose, and names it. The completion is what hardware gives for a malformed request.
#pragma once

#include <string.h>

#include "wire.h"

namespace epcomm::emulated {

/// What a writer did wrong. Reported with the queue pair and the position.
enum Violation : uint8_t {
    kNoViolation = 0,
    // In a request:
    kWrongQueueNumber,  ///< of another queue pair
    kWrongIndex,        ///< not the next index: a stale, torn or misplaced request
    kUnknownOpcode,     ///< or one that this NIC lacks
    kWrongUnits,        ///< size does not fit the opcode
    kReservedBits,      ///< a reserved field is not 0
    kNoBytes,           ///< length 0 (which means 2^31) or over the maximum
    kInlineTooLong,     ///< inline bytes reach past the request
    // Around it:
    kDoorbellQueueNumber,  ///< a doorbell that names another queue pair
    kDoorbellBackwards,    ///< index before the last one
    kDoorbellRequest,      ///< last-request convention: not the request in the ring
    kQueueOverflow,        ///< more requests than slots since the last completion
    kRecordBehind,         ///< doorbell record not yet what the doorbell says
    kRecordWrong,          ///< not the doorbell's index once idle; or one that cannot be
    kReceiveRecord,        ///< the receive word of the record was written
    kSlotReused,           ///< a request changed before its completion was written
    kNumViolations,
};

inline const char* name(Violation violation) {
    static const char* const names[kNumViolations] = {
        "none",           "wrong queue number", "wrong index",      "unknown opcode",
        "wrong units",    "reserved bits",      "no bytes",         "inline too long",
        "doorbell queue", "doorbell backwards", "doorbell request", "queue overflow",
        "record behind",  "record wrong",       "receive record",   "slot reused",
    };
    return names[violation];
}

/// An operation.
struct Request {
    uint8_t opcode;  ///< mlx5::Opcode
    uint8_t flags;   ///< mlx5::ControlFlag
    uint8_t blocks;
    uint8_t inlined;  ///< the bytes are in the request, behind its two first units and 4 bytes
    uint32_t bytes;
    uint32_t local_key;
    uint32_t remote_key;
    uint64_t local_address;
    uint64_t remote_address;
    uint64_t operand;  ///< of an inlined write: its first 8 bytes
    uint64_t compare;

    EPCOMM_HD bool asks_completion() const {
        return (flags & mlx5::kCompletionMask) == mlx5::kCompletion;
    }
    EPCOMM_HD bool is_atomic() const {
        return opcode == mlx5::kAtomicFetchAdd || opcode == mlx5::kAtomicCompareSwap;
    }
    /// Whether it waits for bytes from the peer.
    EPCOMM_HD bool has_response() const { return is_atomic() || opcode == mlx5::kRdmaRead; }
    EPCOMM_HD bool is_fenced() const {
        const int fence = flags & mlx5::kFenceMask;
        return fence == mlx5::kFence || fence == mlx5::kFenceAndOrdering;
    }
};

template <typename Segment>
EPCOMM_HD inline Segment segment_at(const mlx5::Block& block, uint32_t unit) {
    Segment segment;
    memcpy(&segment, &block.unit[unit], sizeof segment);
    return segment;
}

EPCOMM_HD inline bool parse_data(const mlx5::Block& block, uint32_t unit, Request* request) {
    const auto data = segment_at<mlx5::Data>(block, unit);
    request->bytes = data.bytes;
    request->local_key = data.key;
    request->local_address = data.address;
    return request->bytes != 0 && request->bytes <= mlx5::kMaxMessage;
}

EPCOMM_HD inline Violation parse_write(const mlx5::Block& block, uint32_t units, Request* request) {
    const auto header = segment_at<mlx5::InlineHeader>(block, 2);
    if ((header.bytes & mlx5::kInline) == 0) {
        if (units != 3) return kWrongUnits;
        return parse_data(block, 2, request) ? kNoViolation : kNoBytes;
    }
    request->inlined = 1;
    request->bytes = header.bytes & ~mlx5::kInline;
    if (request->bytes == 0) return kNoBytes;
    if (request->bytes > mlx5::kMaxInline) return kInlineTooLong;
    const uint32_t needed = 2 + (4 + request->bytes + mlx5::kUnitBytes - 1) / mlx5::kUnitBytes;
    if (units < needed) return kInlineTooLong;
    const mlx5::Unit& first = block.unit[2];
    request->operand = first.word[1] | uint64_t(first.word[2]) << 32;
    return units == needed ? kNoViolation : kWrongUnits;
}

EPCOMM_HD inline Violation parse_atomic(const mlx5::Block& block, uint32_t units,
                                        Request* request) {
    if (units != 4) return kWrongUnits;
    const auto atomic = segment_at<mlx5::Atomic>(block, 2);
    request->operand = atomic.operand;
    request->compare = atomic.compare;
    return parse_data(block, 3, request) && request->bytes == 8 ? kNoViolation : kNoBytes;
}

/// Read the request that should have `index` on queue pair `number`. Requests of more than one
/// block are unknown here: epcomm writes none.
EPCOMM_HD inline Violation parse(const mlx5::Block& block, uint32_t number, uint16_t index,
                                 Request* request) {
    const auto control = segment_at<mlx5::Control>(block, 0);
    const uint32_t operation = control.operation, queue = control.queue_pair;
    const uint32_t units = queue & 0xff;
    *request = Request{};
    request->opcode = uint8_t(operation);
    request->flags = control.flags;
    request->blocks = 1;
    // The index first: what is not the expected request has no other field to be judged.
    if (uint16_t(operation >> 8) != index) return kWrongIndex;
    if (queue >> 8 != number) return kWrongQueueNumber;
    constexpr uint8_t kKnownFlags = mlx5::kFenceMask | mlx5::kCompletionMask | mlx5::kSolicited;
    if (operation >> 24 != 0 || control.stream[0] != 0 || control.stream[1] != 0 ||
        control.signature != 0 || (control.flags & ~kKnownFlags) != 0 || control.immediate != 0) {
        return kReservedBits;
    }
    if (request->opcode == mlx5::kNop) return units == 1 ? kNoViolation : kWrongUnits;
    const auto remote = segment_at<mlx5::Remote>(block, 1);
    request->remote_address = remote.address;
    request->remote_key = remote.key;
    Violation found;
    switch (request->opcode) {
        case mlx5::kRdmaWrite: found = parse_write(block, units, request); break;
        case mlx5::kRdmaRead:
            found = units != 3                      ? kWrongUnits
                    : parse_data(block, 2, request) ? kNoViolation
                                                    : kNoBytes;
            break;
        case mlx5::kAtomicFetchAdd:
        case mlx5::kAtomicCompareSwap: found = parse_atomic(block, units, request); break;
        default: return kUnknownOpcode;
    }
    return found == kNoViolation && remote.reserved != 0 ? kReservedBits : found;
}

/// What a doorbell says.
struct Rung {
    uint32_t number;
    uint16_t next;         ///< index of the next free block
    bool names_a_request;  ///< the last-request convention
    uint16_t last;         ///< then: its index
    uint32_t words[2];     ///< then: its first 8 bytes
};

/// Both conventions of mlx5::Doorbell, told apart by the units.
EPCOMM_HD inline Rung parse_doorbell(uint64_t word) {
    mlx5::Doorbell doorbell;
    memcpy(&doorbell, &word, sizeof doorbell);
    const uint32_t operation = doorbell.operation, queue = doorbell.queue_pair;
    const uint32_t units = queue & 0xff;
    const uint16_t index = uint16_t(operation >> 8);
    Rung rung{queue >> 8, index, units != 0, index, {operation, queue}};
    if (units != 0) rung.next = uint16_t(index + mlx5::blocks_of(units));
    return rung;
}

}  // namespace epcomm::emulated
