/// What producers of a fabric, its proxy threads and Python share in memory.
///
/// A *fabric* moves bytes between the ranks of a rail, from registered *regions* of one to those
/// of another. A rank's peers on it are the other ranks of its rail; a peer is named by its node
/// number. A *channel* is a lane with an order of its own: on one (peer, channel) data become
/// visible before the signal that follows them, and nothing else is promised.
///
/// Kernels (or host threads) put *triggers* into *rings*; proxy threads of the same process take
/// them out and hand them to a transport. All of a channel's triggers go through one ring,
/// `channel % num_rings`, and a ring is served by one thread.
#pragma once

#include <stdint.h>

/// X(name, value): what the fields of a trigger (fabric/trigger.h) can say.
///   MAX_NODES     10 bits of peer
///   MAX_CHANNELS  6 bits of channel
///   MAX_SIGNALS   16 bits of signal
///   MAX_REGIONS   3 bits of region
///   UNIT          offsets and sizes are multiples of this many bytes
///   MAX_BYTES     20 bits of units; longer puts become several triggers
///   MAX_LOCAL     31 bits of units: end of what is addressable in a local region
///   MAX_REMOTE    32 bits of units: the same in a remote region
///   MAX_RINGS     rings of a rank; a ring has at most one proxy thread of its own
#define EPCOMM_FABRIC_LIMITS(X)            \
    X(MAX_NODES, 1 << 10)                  \
    X(MAX_CHANNELS, 1 << 6)                \
    X(MAX_SIGNALS, 1 << 16)                \
    X(MAX_REGIONS, 1 << 3)                 \
    X(UNIT, 16)                            \
    X(MAX_BYTES, ((1 << 20) - 1) * 16)     \
    X(MAX_LOCAL, ((int64_t)1 << 31) * 16)  \
    X(MAX_REMOTE, ((int64_t)1 << 32) * 16) \
    X(MAX_RINGS, 8)

enum {
#define EPCOMM_FABRIC_LIMIT_ENUM(name, value) EPCOMM_FABRIC_##name = (value),
    EPCOMM_FABRIC_LIMITS(EPCOMM_FABRIC_LIMIT_ENUM)
#undef EPCOMM_FABRIC_LIMIT_ENUM
};

/// Region 0 of every rank holds its signals: 64-bit counters, zero at first, that only ever grow
/// and are never cleared. Exactly one (source node, channel) raises any one of them. Under a direct
/// transport the region's last word is none of them: peers' answers to reads come there.
enum { EPCOMM_FABRIC_SIGNALS = 0 };

typedef enum {
    EPCOMM_FABRIC_NOOP = 0,        ///< moves nothing; completes once the proxy has seen it
    EPCOMM_FABRIC_PUT = 1,         ///< bytes
    EPCOMM_FABRIC_PUT_SIGNAL = 2,  ///< bytes (may be none), then the signal grows by 1
    EPCOMM_FABRIC_SIGNAL_ADD = 3,  ///< the signal grows by a value
} epcomm_fabric_op;

/// What the NICs of a rank sent, and the network that they model. Data are messages of more than
/// one packet; announcements, which go ahead of them, are shorter. Times are in the model, on a
/// clock that the ranks of a machine share.
typedef struct {
    uint64_t messages;
    uint64_t payload_bytes;
    uint64_t wire_bytes;     ///< headers included
    uint64_t late_messages;  ///< placed later than the model says, by more than a tolerance
    uint64_t late_copies;    ///< of these, because their bytes were copied too late
    uint64_t total_late_ns;  ///< of all messages together
    uint64_t worst_late_ns;
    int64_t data_depart_ns;        ///< the first left; 0: there were no data
    int64_t data_arrive_ns;        ///< the last arrived, in the model
    int64_t data_placed_ns;        ///< and in fact, which is never earlier
    int32_t copier_was_the_limit;  ///< then times say nothing about the network
    int32_t num_nics;              ///< of the rank; each has the rate
    uint32_t bytes_per_ns;         ///< on the wire; 0: without limit
    uint32_t latency_ns;           ///< one way
    uint32_t packet_bytes;         ///< payload of a packet
    uint32_t header_bytes;         ///< of a packet
} epcomm_fabric_traffic;

/// A message of a modelled network, from doorbell to completion. Times are of the host's monotonic
/// clock, or of the GPU's timer where the NICs are on it; `depart` and `arrive` are in the model,
/// the others in fact.
typedef struct {
    int64_t rung_ns;       ///< the NIC saw the doorbell; 0: not noted
    int64_t depart_ns;     ///< its first byte leaves
    int64_t arrive_ns;     ///< its last byte arrives
    int64_t landed_ns;     ///< its last bytes were placed; 0: it completed before that
    int64_t completed_ns;  ///< its completion was written, if it asked for one; 0: not noted
    uint64_t position;     ///< of the request in its send queue
    uint64_t bytes;
    uint32_t queue_pair;  ///< its number on this rank's side
    int32_t peer;         ///< node number
    int32_t channel;
    int32_t plane;
} epcomm_fabric_message;

/// What an emulated network card did on purpose, or found.
typedef enum {
    EPCOMM_FABRIC_FAULT = 0,      ///< something went wrong that the options ask for
    EPCOMM_FABRIC_VIOLATION = 1,  ///< whoever writes the requests broke a rule
    EPCOMM_FABRIC_FAILED = 2,     ///< a queue pair went into the error state
    EPCOMM_FABRIC_RECOVERED = 3,  ///< the doorbell record made up for a lost doorbell
} epcomm_fabric_event_kind;

/// It happened to one request, or to the doorbell behind the requests before it.
typedef struct {
    int64_t time_ns;      ///< by the clock of messages
    uint64_t amount_ps;   ///< of a fault: how much later it made something; else 0
    uint64_t position;    ///< of the request in its send queue
    uint32_t queue_pair;  ///< its number on this rank's side
    int32_t peer;         ///< node number
    int32_t channel;
    int32_t plane;
    int32_t kind;  ///< epcomm_fabric_event_kind
    int32_t code;  ///< which fault, rule or error: see epcomm_fabric_event_text
} epcomm_fabric_event;

/// Why a fabric stopped. Once it has, nothing more is sent and every wait on it ends.
typedef enum {
    EPCOMM_FABRIC_OK = 0,
    EPCOMM_FABRIC_TRANSPORT = 1,    ///< the transport completed an operation with an error
    EPCOMM_FABRIC_BAD_TRIGGER = 2,  ///< peer, channel, region, offset or signal out of range
    EPCOMM_FABRIC_RING_FULL = 3,    ///< a producer waited for a slot until its deadline
    EPCOMM_FABRIC_STALLED = 4,      ///< a proxy thread ended or gives no sign of life
    EPCOMM_FABRIC_STOPPED = 5,      ///< the fabric was stopped; no error
} epcomm_fabric_status;

/// Two 64-bit words; the top bit of each is the parity of the slot's lap.
typedef struct {
    uint64_t word[2];
} epcomm_trigger;

/// The producers' part of a ring: in device memory for a ring that kernels fill, in host memory
/// for one that host threads fill. Never both kinds of producer: the atomics of a device on memory
/// of its own are not atomic for the host.
typedef struct {
    uint64_t head;       ///< next free position; producers reserve with an atomic addition
    uint64_t tail_seen;  ///< a value the tail once had; saves reading it over the bus
    uint64_t reserved[14];
} epcomm_ring_producer;

/// The consumer's part of a ring, in host memory that producers can read. Written by the ring's
/// proxy thread alone.
typedef struct {
    uint64_t tail;  ///< positions below were taken out of the ring: their slots are free
    uint64_t reserved_tail[15];
    uint64_t completed;  ///< all positions below have completed at their peers
    uint64_t reserved_completed[15];
} epcomm_ring_consumer;

/// Positions only grow; position p lies in slot p % num_slots, in lap p / num_slots.
typedef struct {
    epcomm_trigger* slots;  ///< plain (not write-combined) host memory, pinned for a device
    epcomm_ring_producer* producer;
    epcomm_ring_consumer* consumer;
    uint64_t num_slots;  ///< a power of two
} epcomm_ring;

/// What failed first.
typedef struct {
    int32_t status;       ///< epcomm_fabric_status
    int32_t vendor;       ///< the transport's own code, such as ibv_wc_status; 0 if it has none
    int32_t peer;         ///< node number, or -1
    int32_t channel;      ///< or -1
    int32_t op;           ///< epcomm_fabric_op
    uint32_t queue_pair;  ///< its number on this rank's side; 0 if it has none
    uint64_t bytes;
    uint64_t position;  ///< of the trigger in its ring
    char text[512];     ///< in words; terminated
} epcomm_fabric_error;

/// A plane that is not used any more for a peer, because a queue pair of it failed there.
typedef struct {
    int32_t peer;         ///< node number
    int32_t plane;        ///<
    int32_t channel;      ///< whose queue pair it was
    int32_t vendor;       ///< why, as in epcomm_fabric_error
    uint32_t queue_pair;  ///< its number on this rank's side
    uint32_t reserved;
    uint64_t position;  ///< of the request that failed
} epcomm_fabric_loss;

enum { EPCOMM_FABRIC_MAX_LOSSES = 64 };

/// A proxy thread's signs of life.
typedef struct {
    uint64_t heartbeat;  ///< grows with every round of the thread
    uint64_t triggers;   ///< taken out of rings so far
    uint64_t busy_ns;    ///< processor time used so far, brought up to date when idle
    uint32_t asleep;     ///< futex word: 1 while the thread naps
    int32_t running;     ///< 1 from start to end of the thread
    uint64_t reserved[12];
} epcomm_proxy_thread;

/// Host memory that producers can read, pinned for a device.
typedef struct {
    uint32_t failed;  ///< epcomm_fabric_status, written (release) after `error`; 0 = going
    uint32_t reserved[31];
    uint32_t failing;  ///< taken by the first that reports an error
    uint32_t reserved_failing[31];
    epcomm_fabric_error error;
    epcomm_proxy_thread threads[EPCOMM_FABRIC_MAX_RINGS];
    epcomm_ring_consumer consumers[EPCOMM_FABRIC_MAX_RINGS];
    uint32_t num_losses;  ///< planes lost, written (release) after the entry
    uint32_t reserved_losses[31];
    epcomm_fabric_loss losses[EPCOMM_FABRIC_MAX_LOSSES];  ///< the first ones, in order of time
} epcomm_fabric_state;

/// Which of the two structures below producers take, and so how they send.
typedef enum {
    EPCOMM_FABRIC_KIND_PROXY = 0,  ///< epcomm_fabric: triggers in rings, for proxy threads
    EPCOMM_FABRIC_KIND_IBGDA = 1,  ///< epcomm_ibgda: requests in send queues, for the NIC itself
} epcomm_fabric_kind;

/// What producers need; plain data that a kernel takes by value. Pointers are valid where the
/// producers run.
typedef struct {
    epcomm_ring rings[EPCOMM_FABRIC_MAX_RINGS];
    epcomm_fabric_state* state;
    int64_t timeout_ns;  ///< how long a producer waits for a free slot
    int32_t num_rings;
    int32_t num_threads;  ///< ring r is served by thread r % num_threads
    int32_t num_channels;
    int32_t num_nodes;
    int32_t node;  ///< this rank's
    int32_t reserved;
} epcomm_fabric;

/// A registered region as one NIC knows it.
typedef struct {
    uint64_t address;
    uint64_t bytes;
    uint32_t key;
} epcomm_region_key;

/// What producers need that fill the NICs' send queues themselves; as above. There is a queue pair
/// for each (peer, channel); those of the own node are not used. A channel belongs to one of the
/// rank's NICs, its planes: the one of number `channel % num_planes`.
typedef struct {
    void* queues;                     ///< mlx5::SendQueue [num_nodes][num_channels]
    const epcomm_region_key* local;   ///< [num_planes][EPCOMM_FABRIC_MAX_REGIONS]
    const epcomm_region_key* remote;  ///< [num_nodes][num_planes][EPCOMM_FABRIC_MAX_REGIONS]
    epcomm_fabric_state* state;
    int64_t timeout_ns;  ///< how long a producer waits for a free slot
    int32_t num_channels;
    int32_t num_nodes;
    int32_t num_planes;
    int32_t node;         ///< this rank's
    int32_t num_signals;  ///< of a peer; region 0 has a word more, for answers
    int32_t failover;     ///< 1: other planes take over from a dead one; 0: it ends the fabric
    uint64_t* raised;     ///< [num_nodes][num_signals]: what this rank raised them to, and a lock;
                          ///< zeros at first
} epcomm_ibgda;

/// A place in a region: of this rank (local) or of a peer (remote).
typedef struct {
    int32_t region;
    int32_t reserved;
    uint64_t offset;  ///< bytes, a multiple of EPCOMM_FABRIC_UNIT
} epcomm_fabric_place;
