// The job `copies`: what the transport `local-cuda` and its carrier share.
//
// The rank's proxy threads hand operations over in shared memory and get completions back there:
// for each lane two rings with a slot for every operation that may be under way, so neither can be
// full, and each side keeps its own places.
#pragma once

#include "../fabric/atomics.h"
#include "../fabric/transport.h"
#include "ipc.h"

namespace epcomm::carrier {

/// A cudaError_t as a completion's vendor code; codes above 0 are fabric::CopyFailure.
constexpr int32_t vendor_code(int32_t error) { return -error; }

/// How a rank's regions are reached from other processes; plain data.
struct CopyAddress {
    int32_t pid;
    int32_t node;
    IpcMemory regions[EPCOMM_FABRIC_MAX_REGIONS];
};

/// The setup: this, then the addresses of all nodes' ranks, the own one included.
struct CopySetup {
    int32_t device;
    int32_t node;
    int32_t num_nodes;
    int32_t num_channels;
    int32_t num_lanes;
    uint32_t num_slots;  ///< of a lane, a power of two
};

/// Of one lane; its rings follow it.
struct CopyLane {
    alignas(64) uint64_t posted;     ///< operations handed over; raised by the rank
    alignas(64) uint64_t completed;  ///< completions written; raised by the carrier
};

/// Places in the shared memory.
class CopyMemory {
 public:
    CopyMemory(void* start, uint32_t num_slots)
        : start_(static_cast<uint8_t*>(start)), num_slots_(num_slots) {}

    static uint64_t bytes(int32_t num_lanes, uint32_t num_slots) {
        return kHeaderBytes + uint64_t(num_lanes) * lane_bytes(num_slots);
    }

    /// Nonzero: the carrier sleeps, or is about to look for work a last time.
    uint32_t* asleep() const { return reinterpret_cast<uint32_t*>(start_); }

    CopyLane* lane(int32_t number) const {
        return reinterpret_cast<CopyLane*>(start_ + kHeaderBytes +
                                           uint64_t(number) * lane_bytes(num_slots_));
    }
    fabric::Operation* operation(CopyLane* lane, uint64_t position) const {
        return reinterpret_cast<fabric::Operation*>(lane + 1) + (position & (num_slots_ - 1));
    }
    fabric::Completion* completion(CopyLane* lane, uint64_t position) const {
        return reinterpret_cast<fabric::Completion*>(
                   reinterpret_cast<fabric::Operation*>(lane + 1) + num_slots_) +
               (position & (num_slots_ - 1));
    }

 private:
    static constexpr uint64_t kHeaderBytes = 64;
    static uint64_t lane_bytes(uint32_t num_slots) {
        const uint64_t rings = num_slots * (sizeof(fabric::Operation) + sizeof(fabric::Completion));
        return sizeof(CopyLane) + (rings + 63) / 64 * 64;
    }

    uint8_t* start_;
    uint32_t num_slots_;
};

}  // namespace epcomm::carrier
