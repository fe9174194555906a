/// epcomm_cuda, between nodes: what the kernels of the two-hop path share with the host.
///
/// A token reaches a node that is not its own as one *record*, which its source packs into staging
/// and puts, in chunks, to its rail peer there. The peer's data kernel stores the record's rows in
/// its node. Each call's parameters are the one-node call's and what the second hop needs.
#pragma once

#include "../protocol/chunk.h"
#include "epcomm_cuda.h"
#include "epcomm_fabric.h"

#ifdef __cplusplus
extern "C" {
#endif

/// Where a rank of the world is.
typedef struct {
    int16_t node;
    int16_t local;
} epcomm_cuda_place;

/// One record of a token. A token's list is in order of nodes, then node = -1.
typedef struct {
    int32_t node;
    int32_t slot;
} epcomm_cuda_far;

/// What stays the same for the life of a buffer: staging and the way to the rail peers.
typedef struct {
    epcomm_chunking chunking;
    int32_t fabric_kind;  ///< epcomm_fabric_kind: which of the next two the kernels use
    epcomm_fabric fabric;
    epcomm_ibgda ibgda;
    const epcomm_cuda_place* places;  ///< [R]
    const int32_t* rail;              ///< rank of this rail on every node, [N]
    uint8_t* send;                    ///< region SEND
    const uint8_t* receive;           ///< region RECEIVE
    uint8_t* outbox;                  ///< region OUTBOX
    const uint8_t* inbox;             ///< region INBOX
    const uint64_t* signals;          ///< region SIGNALS
    uint64_t* expected;               ///< chunk signals after the last call, [N - 1][W]
    uint32_t* filled;                 ///< records written of a chunk to send, [N - 1][W]
    uint64_t* credited;               ///< bounded: credits after the last call, [N - 1][W]
    uint32_t* emptied;                ///< bounded: records read of a chunk received, [N - 1][W]
    uint32_t* dealt;                  ///< items handed out: sending, receiving
} epcomm_cuda_rail;

/// Device arrays of a handle. In both hops a list of copies has an entry for every choice on this
/// node, in order of (local rank, choice), also in layout rank, where the first of a rank stands
/// for its row.
typedef struct {
    int32_t* index;               ///< place of choice k among this source's rows there, [T, K]
    epcomm_cuda_far* far;         ///< [T, F]
    int32_t* token_of;            ///< token of a record to send, [N - 1, slots]
    int32_t* base;                ///< first row here of every source of this rail, [N, keys]
    epcomm_cuda_dest* forwarded;  ///< copies of a record received, [N - 1, slots, K]
    int32_t* sent;                ///< records to each peer, [N - 1]
    int32_t* received;            ///< records from each peer, [N - 1]
    int32_t max_far;              ///< F
    int32_t num_keys;             ///< L (layout rank), or experts of this node (layout expert)
} epcomm_cuda_hops;

typedef struct {
    epcomm_cuda_layout call;
    epcomm_cuda_rail rail;
    epcomm_cuda_hops hops;
} epcomm_cuda_two_hop_layout;

typedef struct {
    epcomm_cuda_dispatch call;
    epcomm_cuda_rail rail;
    epcomm_cuda_hops hops;
    epcomm_record record;
    int32_t forward_list;  ///< first dispatch: fill in hops.forwarded
} epcomm_cuda_two_hop_dispatch;

typedef struct {
    epcomm_cuda_combine call;
    epcomm_cuda_rail rail;
    epcomm_cuda_hops hops;
    epcomm_record record;
} epcomm_cuda_two_hop_combine;

EPCOMM_API int epcomm_cuda_load_two_hop(void);

/// As the launches of one node's calls.
EPCOMM_API int epcomm_cuda_launch_two_hop_layout(const epcomm_cuda_two_hop_layout* call,
                                                 epcomm_cuda_sequence* sequence, void* stream);
EPCOMM_API int epcomm_cuda_launch_two_hop_dispatch(const epcomm_cuda_two_hop_dispatch* call,
                                                   epcomm_cuda_sequence* sequence, void* stream);
EPCOMM_API int epcomm_cuda_launch_two_hop_combine(const epcomm_cuda_two_hop_combine* call,
                                                  epcomm_cuda_sequence* sequence, void* stream);

#ifdef __cplusplus
}
#endif
