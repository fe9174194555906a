// What a ConnectX (mlx5) NIC reads and writes in memory: work requests, doorbells, completions.
//
// Written from the public interface of rdma-core (infiniband/mlx5dv.h), for host and device code;
// tests/native/mlx5_parity.cc compares every size, offset, number and byte with that header.
//
// A reliable connected send queue is a ring of a power of two of 64-byte *blocks* (WQEBB). A work
// request is a chain of 16-byte segments and takes as many whole blocks as it needs. Blocks are
// counted by a free-running 16-bit counter: block `index` lies at `index & (num_blocks - 1)`, and a
// request that takes two blocks may have the second one at the start of the ring.
//
//     RDMA write            Control | Remote | Data                         3 units, 1 block
//     RDMA write, inline    Control | Remote | InlineHeader + bytes         3 or 4 units, 1 block
//     RDMA read             Control | Remote | Data                         3 units, 1 block
//     fetch and add         Control | Remote | Atomic | Data (old value)    4 units, 1 block
//     compare and swap      as fetch and add
//     nothing               Control                                         1 unit, 1 block
#pragma once

#include "bytes.h"

namespace epcomm::mlx5 {

constexpr uint32_t kBlockBytes = 64;  ///< MLX5_SEND_WQE_BB
constexpr uint32_t kUnitBytes = 16;   ///< what `ds` counts
constexpr uint32_t kUnitsPerBlock = kBlockBytes / kUnitBytes;
/// Deeper rings would make a distance of two 16-bit counters ambiguous.
constexpr uint32_t kMaxBlocks = 32768;
/// Bytes of the largest message.
constexpr uint32_t kMaxMessage = 1u << 31;

EPCOMM_HD inline uint32_t blocks_of(uint32_t units) {
    return (units + kUnitsPerBlock - 1) / kUnitsPerBlock;
}

/// Low byte of a work request's first word.
enum Opcode : uint8_t {
    kNop = 0x00,
    kRdmaWrite = 0x08,
    kRdmaWriteImm = 0x09,
    kSend = 0x0a,
    kSendImm = 0x0b,
    kRdmaRead = 0x10,
    kAtomicCompareSwap = 0x11,
    kAtomicFetchAdd = 0x12,
    kAtomicMaskedCompareSwap = 0x14,
    kAtomicMaskedFetchAdd = 0x15,
};

/// Bits of Control::flags: when a completion is written, and what a request waits for.
enum ControlFlag : uint8_t {
    kSolicited = 1 << 1,
    kCompletion = 2 << 2,        ///< always write a completion; without it only on an error
    kCompletionMask = 3 << 2,    ///<
    kInitiatorFence = 1 << 5,    ///< wait for earlier reads and atomics, small
    kFence = 2 << 5,             ///< wait for earlier reads and atomics
    kStrongOrdering = 3 << 5,    ///<
    kFenceAndOrdering = 4 << 5,  ///< MLX5_WQE_CTRL_FENCE
    kFenceMask = 7 << 5,
};

/// First segment of every work request; its first 8 bytes are also what a doorbell carries.
struct Control {
    Be32 operation;     ///< operation modifier << 24 | block index << 8 | opcode
    Be32 queue_pair;    ///< queue pair number << 8 | units of the whole request
    uint8_t signature;  ///< 0: not checked
    uint8_t stream[2];  ///< of other transports; 0
    uint8_t flags;      ///< ControlFlag
    Be32 immediate;     ///< 0 unless the opcode carries one
};

/// Where at the peer.
struct Remote {
    Be64 address;
    Be32 key;
    Be32 reserved;
};

/// Bytes in this rank's memory.
struct Data {
    Be32 bytes;
    Be32 key;
    Be64 address;
};

/// Before bytes that are part of the request; they follow without a gap, padded to a unit.
struct InlineHeader {
    Be32 bytes;  ///< | kInline
};
constexpr uint32_t kInline = 0x80000000u;
/// What fits into a request of one block behind Control and Remote.
constexpr uint32_t kMaxInline = kBlockBytes - 32 - 4;

struct Atomic {
    Be64 operand;  ///< the addend, or the value to store
    Be64 compare;
};

/// Words of a doorbell record; a word holds the 16-bit index of the next free block, big-endian.
enum DoorbellRecordWord { kReceiveRecord = 0, kSendRecord = 1, kRecordWords = 2 };

/// What is stored to the doorbell register, as one 64-bit store.
///
/// Two conventions work with the hardware, which looks at queue pair and index only: the first 8
/// bytes of the last request (then `units` is not 0), or the next free index with opcode and units
/// 0. epcomm rings the second one: it needs no memory of the last request.
struct Doorbell {
    Be32 operation;
    Be32 queue_pair;
};

EPCOMM_HD inline Doorbell next_index_doorbell(uint32_t queue_pair, uint16_t next) {
    return {uint32_t(next) << 8, queue_pair << 8};
}

/// High half of a completion's last byte.
enum CompletionOpcode : uint8_t {
    kCompleted = 0,  ///< of a request of this queue pair
    kReceivedWriteImm = 1,
    kReceivedSend = 2,
    kRequestError = 13,
    kReceiveError = 14,
    kInvalid = 15,  ///< what software fills the ring with at the start
};

/// Why a request failed.
enum Syndrome : uint8_t {
    kLocalLength = 0x01,
    kLocalOperation = 0x02,   ///< the request itself is not well formed
    kLocalProtection = 0x04,  ///< local key or bounds
    kFlushed = 0x05,          ///< behind a failed request; not tried
    kBadResponse = 0x10,
    kLocalAccess = 0x11,
    kRemoteInvalid = 0x12,  ///< such as a misaligned atomic
    kRemoteAccess = 0x13,   ///< remote key, bounds or permission
    kRemoteOperation = 0x14,
    kRetryExceeded = 0x15,  ///< the peer does not answer
    kReceiverNotReady = 0x16,
    kRemoteAborted = 0x22,
};

/// An entry of a completion queue, 64 bytes.
///
/// The last byte is written last. An entry is valid if its opcode is not kInvalid and its owner bit
/// is the parity of the consumer's lap: 0 in the first. `index` is that of the first block.
struct Completion {
    uint8_t reserved0[36];
    Be32 immediate;
    uint8_t reserved40[4];
    Be32 bytes;
    Be64 timestamp;
    Be32 queue_pair;  ///< opcode of the request << 24 | queue pair number
    Be16 index;
    uint8_t signature;
    uint8_t opcode_owner;  ///< CompletionOpcode << 4 | format << 2 | solicited << 1 | owner
};

/// The same entry if its opcode is an error. The hardware's own syndrome bytes are reserved in the
/// public header.
struct ErrorCompletion {
    uint8_t reserved0[52];
    uint8_t hardware_syndrome;
    uint8_t hardware_syndrome_type;
    uint8_t vendor_syndrome;
    uint8_t syndrome;  ///< Syndrome
    Be32 queue_pair;
    Be16 index;
    uint8_t signature;
    uint8_t opcode_owner;
};

constexpr uint8_t kOwnerBit = 1;

EPCOMM_HD inline uint8_t opcode_of(uint8_t opcode_owner) { return opcode_owner >> 4; }

static_assert(sizeof(Control) == 16 && sizeof(Remote) == 16 && sizeof(Data) == 16, "one unit");
static_assert(sizeof(Atomic) == 16 && sizeof(InlineHeader) == 4, "one unit; a word");
static_assert(sizeof(Doorbell) == 8, "one 64-bit store");
static_assert(sizeof(Completion) == 64 && sizeof(ErrorCompletion) == 64, "one cache line");

/// A request of one block, as the 16-byte units it is stored by.
struct alignas(16) Unit {
    uint32_t word[4];
};
struct Block {
    Unit unit[kUnitsPerBlock];
};
static_assert(sizeof(Block) == kBlockBytes, "a block is four units");

/// English for a Syndrome.
inline const char* describe(uint8_t syndrome) {
    switch (syndrome) {
        case kLocalLength: return "local length error";
        case kLocalOperation: return "local queue pair operation error: malformed request";
        case kLocalProtection: return "local protection error: local key or bounds";
        case kFlushed: return "flushed: the queue pair was in the error state";
        case kBadResponse: return "bad response";
        case kLocalAccess: return "local access error";
        case kRemoteInvalid: return "remote invalid request: operation not possible there";
        case kRemoteAccess: return "remote access error: remote key, bounds or permission";
        case kRemoteOperation: return "remote operation error";
        case kRetryExceeded: return "transport retries exceeded: the peer does not answer";
        case kReceiverNotReady: return "receiver not ready, retries exceeded";
        case kRemoteAborted: return "aborted by the peer";
        default: return "unknown syndrome";
    }
}

}  // namespace epcomm::mlx5
