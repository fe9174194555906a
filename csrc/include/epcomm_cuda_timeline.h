/// Timelines: what the warps of a rank's kernels did, and when.
///
/// A rank has a ring of spans for each thread block, in device memory; where it has none, nothing
/// is noted. Spans of a warp either follow each other or lie one in the other.
#pragma once

#include <stdint.h>

/// X(NAME): what a span is about. Those of a whole block have warp -1.
///   COUNT     block: count choices
///   MEET      block: until all of the rank's blocks have come as far
///   ANNOUNCE  block 0: announce
///   LISTEN    block: until all announcements are in; block 0 between nodes also hands on what the
///             rail peers announce. A combine between nodes first waits for those of its node
///   PLACE     warp: find every copy's row; between nodes before LISTEN its number among this
///             rank's, and behind it the row
///   PACK      warp: write records of a dispatch for other nodes
///   PUT       warp, in PACK or REDUCE: hand a chunk that is complete to the fabric
///   CREDIT    warp, in PACK or REDUCE: bounded staging: no place is free for what is to be sent
///   STORE     warp: store rows in the own node
///   FORWARD   warp: store the rows of records that arrive
///   WAIT      warp, in FORWARD or FINISH: until a chunk is there
///   REDUCE    warp: sum rows: for other nodes; in a world of one node, of this rank's tokens
///   FINISH    warp: sum the rows of this rank's tokens over the nodes
///   ARRIVE    block, the last: until all ranks of the node are done
#define EPCOMM_CUDA_ROLES(X) \
    X(COUNT)                 \
    X(MEET)                  \
    X(ANNOUNCE)              \
    X(LISTEN)                \
    X(PLACE)                 \
    X(PACK)                  \
    X(PUT)                   \
    X(CREDIT)                \
    X(STORE)                 \
    X(FORWARD)               \
    X(WAIT)                  \
    X(REDUCE)                \
    X(FINISH)                \
    X(ARRIVE)

typedef enum {
#define EPCOMM_CUDA_ROLE_ENUM(name) EPCOMM_CUDA_ROLE_##name,
    EPCOMM_CUDA_ROLES(EPCOMM_CUDA_ROLE_ENUM)
#undef EPCOMM_CUDA_ROLE_ENUM
} epcomm_cuda_role;

typedef struct {
    uint64_t begin;  ///< nanoseconds of the GPU's clock
    uint64_t end;
    uint64_t epoch;  ///< of the call; the same on all ranks
    int16_t role;    ///< epcomm_cuda_role
    int16_t block;
    int16_t warp;   ///< or -1: the whole block
    int16_t node;   ///< PUT, CREDIT: to which, WAIT: from which; else -1
    int32_t chunk;  ///< PUT, WAIT: which of that node's in this call; else -1
    int32_t items;  ///< of a warp's role: tokens or records done
} epcomm_cuda_span;

typedef struct {
    epcomm_cuda_span* spans;  ///< [num_blocks][capacity]; span i of a block lies at i % capacity
    uint64_t* counts;     ///< [num_blocks]: spans noted so far; the oldest beyond capacity are lost
    uint32_t capacity;    ///< of a block, a power of two
    uint32_t num_blocks;  ///< rings; block b uses ring b % num_blocks
} epcomm_cuda_timeline;
