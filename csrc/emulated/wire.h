// The emulated network: what its NICs know of each other. Plain data without pointers, so that an
// NIC can lie in memory shared by the processes of a machine.
//
// Times are picoseconds since the network was made, so that a 64-byte message at 50 GB/s (1.3 ns)
// still has a length; 64 bits last 213 days.
#pragma once

#include "../mlx5/mlx5.h"

namespace epcomm::emulated {

using Picoseconds = uint64_t;

constexpr Picoseconds kNanosecond = 1000;
constexpr Picoseconds kNever = ~uint64_t(0);

constexpr uint32_t kMaxKeys = 64;
constexpr uint32_t kMaxQueues = 256;
/// Numbers count from here, so that 0 and small integers are never a valid queue pair or key.
constexpr uint32_t kFirstQueue = 0x100;
constexpr uint32_t kFirstKey = 0x1000;

/// What an NIC's port can do. A rate of 0 is without limit.
struct LineModel {
    uint32_t bytes_per_ns;  ///< wire bytes, headers included; 50 for 400 Gbit/s
    uint32_t packet_bytes;  ///< payload of a packet (MTU)
    uint32_t header_bytes;  ///< per packet: about 30 on InfiniBand, 80 on RoCE v2
    uint32_t message_ns;    ///< at least between two messages of an NIC
    uint32_t fetch_ns;      ///< from doorbell to first byte on the wire
    uint32_t latency_ns;    ///< one way
    uint32_t retry_ns;      ///< until a peer that does not answer is given up
    uint32_t reserved;
};

/// One direction of a port: when it is next free.
struct alignas(64) Gate {
    Picoseconds free_at;
};

enum Access : uint32_t {
    kLocalWrite = 1,
    kRemoteWrite = 2,
    kRemoteRead = 4,
    kRemoteAtomic = 8,
};

/// Registered memory. Entries are made before the network runs and not changed after.
struct Key {
    uint64_t address;  ///< as requests name it
    uint64_t bytes;
    uint32_t domain;  ///< protection domain
    uint32_t access;  ///< Access bits; reading it locally is always allowed
};

enum QueueState : uint32_t { kReset = 0, kReady = 1, kFailed = 2 };

/// What a peer's NIC must know of a queue pair.
struct QueueEntry {
    uint32_t state;  ///< QueueState
    uint32_t domain;
    uint32_t peer_nic;
    uint32_t peer_number;
};

struct Nic {
    LineModel line;
    Gate transmit, receive;
    /// Who has an atomic operation of this NIC between read and write: ns << 16 | (its NIC + 1).
    alignas(64) uint64_t atomics;
    uint32_t dead;  ///< 1: does not answer any more
    uint32_t num_keys;
    uint32_t num_queues;
    Key keys[kMaxKeys];  ///< zeros behind the last one
    QueueEntry queues[kMaxQueues];
};

/// The network as one process sees it.
struct Wire {
    int64_t epoch_ns;  ///< time 0 on the machine's monotonic clock, the same for all
    uint32_t num_nics;
    Nic* const* nics;
    /// [num_nics][kMaxKeys]: what to add to an address of that memory to reach it from here, where
    /// it is another process's; null: nothing.
    const int64_t* shifts = nullptr;
    /// [num_nics]: where an NIC's keys are nearer than in it; null: nowhere.
    const Key* const* near_keys = nullptr;

    EPCOMM_HD Nic& nic(uint32_t i) const { return *nics[i]; }
    EPCOMM_HD const Key* keys(uint32_t i) const {
        return near_keys == nullptr ? nics[i]->keys : near_keys[i];
    }

    /// Memory of an NIC's rank, in this process. The key has been checked.
    EPCOMM_HD uint8_t* reach(uint32_t i, uint32_t key, uint64_t address) const {
        const int64_t shift = shifts == nullptr ? 0 : shifts[i * kMaxKeys + key - kFirstKey];
        return reinterpret_cast<uint8_t*>(address + uint64_t(shift));
    }
};

EPCOMM_HD inline QueueEntry* find_queue(Nic& nic, uint32_t number) {
    const uint32_t slot = number - kFirstQueue;
    return slot < nic.num_queues ? &nic.queues[slot] : nullptr;
}

/// Of an NIC's keys the one that a request names; one that allows nothing if there is none.
EPCOMM_HD inline Key find_key(const Key* keys, uint32_t number) {
    const uint32_t slot = number - kFirstKey;
    Key key = keys[slot < kMaxKeys ? slot : 0];  // no branch, which would make loads wait
    if (slot >= kMaxKeys) key.bytes = 0;
    return key;
}

/// Whether a key covers a range, of one byte at least, for what is to be done there. An address
/// before the memory gives a difference that is larger than any memory.
EPCOMM_HD inline bool allows(const Key& key, uint32_t domain, uint32_t access, uint64_t address,
                             uint64_t bytes) {
    return (key.domain == domain) & ((key.access & access) == access) & (bytes <= key.bytes) &
           (address - key.address <= key.bytes - bytes);
}

}  // namespace epcomm::emulated
