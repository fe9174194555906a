// The GPU-resident engine of a rank's emulated NICs, as its kernel and its host see it: plain data.
//
// A kernel that runs as long as the network does serves all queue pairs of a rank, of one NIC or of
// several. Queue pairs are dealt to its blocks, and in a block to its control warps; copy warps
// place the bodies of messages. See resident.cuh.
#pragma once

#include "host_queues.h"
#include "passage.h"
#include "step.h"
#include "traffic.h"

namespace epcomm::emulated {

/// A queue pair and its place.
struct ResidentQueue {
    QueuePair queue;
    uint32_t nic;    ///< in the wire
    uint32_t plane;  ///< among the rank's NICs
};

enum ResidentOrder : uint32_t {
    kServe = 0,
    kStop = 1,       ///< now, whatever is under way
    kStopClean = 2,  ///< writers are done: records and doorbells are compared before
};

/// In device memory: what the host tells the kernel.
struct Mailbox {
    uint64_t alive;  ///< changes as long as the host lives
    uint32_t order;  ///< ResidentOrder
    /// Another number: forget what was counted. Nothing is under way.
    uint32_t counting;
};

/// In device memory: what a block tells the host. Written by its first warp alone.
struct alignas(64) BlockStatus {
    uint64_t heartbeat;    ///< nanoseconds of the kernel's clock, brought up to date all the time
    uint32_t state;        ///< BlockState
    uint32_t granularity;  ///< of the device's timer, in nanoseconds
};

enum BlockState : uint32_t { kNotStarted = 0, kServing = 1, kEnded = 2, kAbandoned = 3 };

struct Offer;

/// What the kernel is given, by value. All pointers are to device memory, to peers' memory that
/// this process has opened, or, of queues that host threads fill, to host memory that the device
/// reaches.
struct Resident {
    Wire wire;  ///< its epoch is the device's timer
    FaultPlan faults;
    Journal* journal;
    ResidentQueue* queues;
    const uint32_t* first;  ///< [num_blocks + 1]: where a block's queue pairs begin
    Mailbox* mailbox;
    BlockStatus* status;  ///< [num_blocks]
    Traffic* traffic;     ///< [num_blocks][control warps][num_planes][32]
    Offer* offers;        ///< [num_blocks][control warps][kOffers], zeros; see offers.cuh
    uint32_t num_blocks;
    uint32_t num_planes;
    uint32_t max_queues;  ///< of a block, at most
    /// 1: what the NIC knows of requests lies in shared memory, for so many of a queue pair as its
    /// copier has under way; 0: in `QueuePair::flights`, farther away.
    uint32_t near_flights;
    uint32_t strict;
    uint64_t tolerance_ns;
    uint64_t patience_ns;   ///< without a sign of the host's life the kernel ends; 0: never
    HostBells bells;        ///< where host threads fill queues
    PassageRing* passages;  ///< where messages are noted; null: nowhere
};

/// Shared memory of a block; counters, and bytes of offers, of all of them.
uint64_t resident_shared_bytes(const Resident& resident);
uint64_t resident_traffic_cells(const Resident& resident);
uint64_t resident_offer_bytes(const Resident& resident);

/// Load the kernel, before any kernel runs that waits for another: loading would wait for that one.
/// Both return a cudaError_t.
int load_resident(uint64_t shared_bytes);
int launch_resident(const Resident& resident, void* stream);

/// For so long, write the device's timer, in nanoseconds, to host memory as soon as it is read.
int show_timer(uint64_t* place, int64_t duration_ns, void* stream);

}  // namespace epcomm::emulated
