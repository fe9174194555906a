// What the tests hand to the emulated kernels and fabrics; all addresses are of one process.
#pragma once

#include "../../csrc/fabric/ibgda.h"
#include "epcomm_cuda_rail.h"

extern "C" {

/// One kernel launch of a rank's stream.
typedef struct {
    int32_t kind;  ///< 0 layout, 1 dispatch, 2 combine
    int32_t blocks;
    int32_t warps;
    int32_t delay_us;  ///< before it
    const void* call;
} emulated_launch;

/// What a rank runs, in order.
typedef struct {
    const emulated_launch* launches;
    int32_t num_launches;
    int32_t reserved;
} emulated_stream;

/// A rank's place in the fabric.
typedef struct {
    int32_t node;
    int32_t num_nodes;
    const int32_t* rail;      ///< rank of this rail on every node
    uint8_t* const* regions;  ///< by id
    const uint64_t* sizes;    ///< of the regions, in bytes
    int32_t num_regions;
    int32_t silent_after;  ///< operations after which its proxy delivers nothing; -1 = never
    epcomm_fabric_state* state;
    const epcomm_fabric* proxied;  ///< what its proxy serves; null: it has no proxy
    int64_t late_ns;               ///< by which its proxy holds an operation back, at most
} emulated_member;

/// A fault of the emulated NICs (csrc/emulated/fault.h), for requests of a rank.
typedef struct {
    const char* fault;  ///< by name
    int32_t rank;       ///< or -1: all
    int32_t peer;       ///< node, or -1: all
    int32_t channel;    ///< or -1: all
    uint32_t chance;    ///< of 65536
    int64_t first;      ///< requests of a queue pair, counted from its start
    int64_t last;
    uint64_t amount_ns;
    int32_t exact;  ///< 1: late by the amount as it is, 0: by up to that
    int32_t reserved;
} emulated_rule;

/// How NICs are made.
typedef struct {
    int32_t num_channels;
    int32_t num_planes;  ///< NICs of a rank
    uint32_t num_blocks;
    uint32_t retry_ns;
    uint64_t start;  ///< position that all counters start at
    uint64_t seed;
    int32_t shuffle;
    int32_t num_rules;
    const emulated_rule* rules;
    int64_t timeout_ns;
    int32_t failover;
    int32_t reserved;
} emulated_nic_plan;

}  // extern "C"
