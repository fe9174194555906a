// Commands to the card: bit fields in big-endian structures, and where the fields used here lie.
//
// Offsets are counted in bits from a structure's start, most significant bit first, as in the
// adapters' public programming manual and in Linux' include/linux/mlx5/mlx5_ifc.h (GPL-2.0 or
// OpenIB), with which tests/native/mlx5_command_parity.cc compares them where it is installed.
// Fields of objects that lie in registered memory (umem) are of the interface for user space and
// not in Linux' header.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

#include "library.h"

namespace epcomm::fabric::devx {

/// Bits of a structure.
struct Field {
    uint32_t offset;
    uint32_t width;
};

/// A field of a structure that starts at `base`, in the one around it.
constexpr Field at(Field base, Field field) { return {base.offset + field.offset, field.width}; }

enum CommandOpcode : uint16_t {
    kQueryCapabilities = 0x100,
    kCreateCompletionQueue = 0x400,
    kCreateQueuePair = 0x500,
    kResetToInit = 0x502,
    kInitToReceive = 0x503,
    kReceiveToSend = 0x504,
    kToError = 0x507,
    kQueryQueuePair = 0x50b,
};

// The start of every command and of every answer.
namespace head {
constexpr Field opcode = {0x00, 16}, modifier = {0x30, 16};
constexpr Field status = {0x00, 8}, syndrome = {0x20, 32};
constexpr Field number = {0x48, 24};  ///< of the object: of a new one in the answer
}  // namespace head

// QUERY_HCA_CAP; the answer's capabilities by modifier.
namespace capabilities {
constexpr uint32_t kInBytes = 0x10, kOutBytes = 0x1010;
enum Modifier : uint16_t { kGeneral = 0 << 1 | 1, kRoce = 4 << 1 | 1 };  ///< | 1: those in force
constexpr Field body = {0x80, 0};
constexpr Field log_max_qp_sz = {0x88, 8};
constexpr Field log_max_cq_sz = {0xc8, 8};
constexpr Field log_max_msg = {0x1c3, 5};
constexpr Field roce = {0x21d, 1};
constexpr Field cq_oi = {0x220, 1};  ///< completion queues may ignore that they overrun
constexpr Field log_bf_reg_size = {0x26b, 5};
constexpr Field sq_ts_format = {0x440, 2};
constexpr Field roce_qp_ts_format = {0x1e, 2};
}  // namespace capabilities

// CREATE_CQ
namespace completion_queue {
constexpr uint32_t kInBytes = 0x110, kOutBytes = 0x10;
constexpr Field context = {0x80, 0};
constexpr Field umem_offset = {0x280, 64}, umem_id = {0x2c0, 32}, umem_valid = {0x2e0, 1};
// Of the context:
constexpr Field dbr_umem_valid = {0x06, 1};
constexpr Field overrun_ignore = {0x0e, 1};
constexpr Field dbr_umem_id = {0x20, 32};
constexpr Field log_size = {0x63, 5}, uar_page = {0x68, 24};
constexpr Field event_queue = {0xa0, 32};
constexpr Field dbr_addr = {0x1c0, 64};  ///< offset in the memory
}  // namespace completion_queue

// CREATE_QP, the changes of state (which share a layout), and QUERY_QP.
namespace queue_pair {
constexpr uint32_t kInBytes = 0x110, kOutBytes = 0x10;
constexpr uint32_t kShortInBytes = 0x10, kQueryOutBytes = 0x110;
constexpr Field context = {0xc0, 0};
constexpr Field queried_context = {0xc0, 0};
constexpr Field umem_offset = {0x800, 64}, umem_id = {0x840, 32}, umem_valid = {0x860, 1};
// Of the context:
constexpr Field state = {0x00, 4}, service = {0x08, 8}, migration = {0x13, 2};
constexpr Field domain = {0x28, 24};
constexpr Field mtu = {0x40, 3}, log_msg_max = {0x43, 5}, log_sq_size = {0x51, 4};
constexpr Field timestamp_format = {0x58, 2};
constexpr Field uar_page = {0x68, 24};
constexpr Field remote_number = {0xa8, 24};
constexpr Field path = {0xc0, 0};
constexpr Field log_sra_max = {0x388, 3}, retry_count = {0x38d, 3}, rnr_retry = {0x390, 3};
constexpr Field next_send_psn = {0x3c8, 24};
constexpr Field send_completions = {0x3e8, 24};
constexpr Field log_rra_max = {0x488, 3}, atomic_mode = {0x48c, 4};
constexpr Field remote_read = {0x490, 1}, remote_write = {0x491, 1}, remote_atomic = {0x492, 1};
constexpr Field min_rnr_nak = {0x4a3, 5}, next_receive_psn = {0x4a8, 24};
constexpr Field receive_completions = {0x4e8, 24};
constexpr Field dbr_addr = {0x500, 64};
constexpr Field receive_type = {0x565, 3};
constexpr Field dbr_umem_valid = {0x683, 1}, dbr_umem_id = {0x720, 32};
// Of the path:
constexpr Field pkey_index = {0x10, 16};
constexpr Field global = {0x28, 1}, lid = {0x30, 16};
constexpr Field ack_timeout = {0x40, 5}, source_index = {0x48, 8}, hop_limit = {0x58, 8};
constexpr Field traffic_class = {0x64, 8};
constexpr Field gid_high = {0x80, 64}, gid_low = {0xc0, 64};
constexpr Field dscp = {0x10a, 6}, udp_source = {0x110, 16};
constexpr Field ethernet_priority = {0x121, 3}, service_level = {0x124, 4};
constexpr Field port = {0x128, 8};
constexpr Field mac_high = {0x130, 16}, mac_low = {0x140, 32};

enum Service : uint8_t { kReliable = 0 };
enum Migration : uint8_t { kMigrated = 3 };
enum ReceiveType : uint8_t { kNoReceives = 3 };
enum AtomicMode : uint8_t { kEightBytes = 1 };  ///< those of the InfiniBand specification
enum State : uint8_t { kReset = 0, kInit = 1, kReceiving = 2, kSending = 3, kError = 6 };
}  // namespace queue_pair

/// A command or an answer, zeroed.
class Message {
 public:
    explicit Message(uint32_t bytes) : bytes_(bytes) {}
    Message(uint32_t bytes, CommandOpcode opcode) : bytes_(bytes) { set(head::opcode, opcode); }

    /// Throws std::runtime_error for a value that the field cannot hold.
    void set(Field field, uint64_t value);
    uint64_t get(Field field) const;
    void* data() { return bytes_.data(); }
    const void* data() const { return bytes_.data(); }
    size_t size() const { return bytes_.size(); }

 private:
    std::vector<uint8_t> bytes_;
};

/// Why a command failed: the error's text and what the card says.
std::string describe_failure(int error, const Message& answer);

}  // namespace epcomm::fabric::devx
