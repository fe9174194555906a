/// How the records from one rank to one node are numbered, cut into chunks and placed in staging.
///
/// Records to a node are numbered in the order of their tokens; record j lies in slot j, at the
/// sender and at the receiver, and belongs to chunk j / C. A chunk is what one put carries. It has
/// a signal of its own at the receiver, which grows by one in every call that has such a chunk; so
/// nothing is asked of the order in which chunks arrive. What comes back in a combine uses the same
/// slots and signals the other way round.
///
/// A rank's staging has an area for each of its N - 1 peers, in node order.
#pragma once

#include "fabric.h"
#include "host_device.h"
#include "limits.h"

typedef struct {
    int32_t num_nodes;      ///< N
    int32_t node;           ///< of this rank
    int32_t max_records;    ///< slots of a peer
    int32_t chunk_records;  ///< C
    int32_t num_chunks;     ///< of a peer, at most
    int32_t num_channels;   ///< chunk c travels on channel c % num_channels
    int64_t peer_bytes;     ///< staging of a peer, in one direction
} epcomm_chunking;

/// A slot of some peer's, as an item of work.
typedef struct {
    int32_t step;  ///< which peer: 0 to N - 2
    int32_t slot;
} epcomm_chunk_item;

/// Where a slot is, for a rank that receives in it (`signal`) or at either end (`offset`).
typedef struct {
    int32_t chunk;
    int32_t channel;
    int32_t signal;           ///< raised here when `peer`'s chunk has come
    int32_t announce_signal;  ///< raised here when `peer`'s announcement has
    int64_t offset;           ///< bytes, in this rank's staging
} epcomm_slot_place;

/// An item of work of a rank.
typedef struct {
    int32_t slot;
    int32_t send_node;     ///< when it sends
    int32_t receive_node;  ///< when it receives
} epcomm_item_place;

/// Regions of a rank's fabric beside its signals.
typedef enum {
    EPCOMM_REGION_SEND = 1,     ///< staging of records on their way out
    EPCOMM_REGION_RECEIVE = 2,  ///< staging of records that arrive
    EPCOMM_REGION_OUTBOX = 3,   ///< this rank's announcements: two, by parity of the epoch
    EPCOMM_REGION_INBOX = 4,    ///< its peers' announcements: two of each peer
} epcomm_rail_region;

/// Place of `peer` among the peers of `node`.
EPCOMM_HD static inline int32_t epcomm_peer_index(int32_t node, int32_t peer) {
    return peer - (peer > node ? 1 : 0);
}

/// Chunks that hold `records` records.
EPCOMM_HD static inline int32_t epcomm_chunk_count(const epcomm_chunking* chunking,
                                                   int32_t records) {
    return (records + chunking->chunk_records - 1) / chunking->chunk_records;
}

/// Records of chunk `chunk` of `records`.
EPCOMM_HD static inline int32_t epcomm_chunk_length(const epcomm_chunking* chunking,
                                                    int32_t records, int32_t chunk) {
    const int32_t left = records - chunk * chunking->chunk_records;
    return left < chunking->chunk_records ? left : chunking->chunk_records;
}

/// Byte offset, in the staging of a rank on `node`, of a slot of `peer`.
EPCOMM_HD static inline int64_t epcomm_slot_offset(const epcomm_chunking* chunking, int32_t node,
                                                   int32_t peer, int32_t slot,
                                                   int64_t record_bytes) {
    return epcomm_peer_index(node, peer) * chunking->peer_bytes + slot * record_bytes;
}

/// Signals of a rank: one a peer for announcements, then one for each chunk of each peer.
EPCOMM_HD static inline int64_t epcomm_num_signals(int64_t num_nodes, int64_t num_chunks) {
    return (num_nodes - 1) * (1 + num_chunks);
}

/// Signal that `peer` raises at a rank on `node` for its announcement.
EPCOMM_HD static inline int32_t epcomm_announce_signal(int32_t node, int32_t peer) {
    return epcomm_peer_index(node, peer);
}

/// Signal that `peer` raises at a rank on `node` for its chunk `chunk`.
EPCOMM_HD static inline int32_t epcomm_chunk_signal(const epcomm_chunking* chunking, int32_t node,
                                                    int32_t peer, int32_t chunk) {
    return chunking->num_nodes - 1 + epcomm_peer_index(node, peer) * chunking->num_chunks + chunk;
}

/// Items that cover all slots where the fullest peer has `records`.
EPCOMM_HD static inline int32_t epcomm_num_items(const epcomm_chunking* chunking, int32_t records) {
    return epcomm_chunk_count(chunking, records) * chunking->chunk_records *
           (chunking->num_nodes - 1);
}

/// Item `item`: first chunk of every peer in turn, then the second, so that all links are busy
/// from the start. Slots beyond a peer's records are nobody's work.
EPCOMM_HD static inline epcomm_chunk_item epcomm_item_of(const epcomm_chunking* chunking,
                                                         int32_t item) {
    const int32_t in_chunk = item % chunking->chunk_records, turn = item / chunking->chunk_records;
    const int32_t peers = chunking->num_nodes - 1;
    const epcomm_chunk_item found = {turn % peers,
                                     turn / peers * chunking->chunk_records + in_chunk};
    return found;
}

/// The node that a rank on `chunking->node` sends to in step `step`: nearest following first.
EPCOMM_HD static inline int32_t epcomm_send_node(const epcomm_chunking* chunking, int32_t step) {
    return (chunking->node + 1 + step) % chunking->num_nodes;
}

/// The node it receives from in that step: the one that sends to it then.
EPCOMM_HD static inline int32_t epcomm_receive_node(const epcomm_chunking* chunking, int32_t step) {
    return (chunking->node + chunking->num_nodes - 1 - step) % chunking->num_nodes;
}

/// Fill in `chunk_records` (a power of two times the wanted one, so that the signals suffice),
/// `num_chunks` and `peer_bytes`. Returns 0, or -1 where the fabric's fields are too narrow.
EPCOMM_HD static inline int32_t epcomm_plan_chunks(epcomm_chunking* chunking, int64_t record_bytes,
                                                   int32_t wanted_records) {
    const int64_t peers = chunking->num_nodes - 1;
    int64_t records = wanted_records;
    if (records < 1 || chunking->max_records < 1 || chunking->num_nodes < 2 ||
        chunking->num_nodes > EPCOMM_FABRIC_MAX_NODES ||
        chunking->num_channels > EPCOMM_FABRIC_MAX_CHANNELS || chunking->num_channels < 1) {
        return -1;
    }
    while (records < chunking->max_records &&
           epcomm_num_signals(chunking->num_nodes, (chunking->max_records + records - 1) /
                                                       records) > EPCOMM_FABRIC_MAX_SIGNALS) {
        records *= 2;
    }
    chunking->chunk_records = (int32_t)records;
    chunking->num_chunks = (int32_t)((chunking->max_records + records - 1) / records);
    chunking->peer_bytes = (chunking->max_records * record_bytes + EPCOMM_LIMIT_window_align - 1) /
                           EPCOMM_LIMIT_window_align * EPCOMM_LIMIT_window_align;
    // Items are counted in 32 bits.
    const int64_t items = (int64_t)chunking->num_chunks * records * peers;
    return peers * chunking->peer_bytes <= EPCOMM_FABRIC_MAX_LOCAL && items < INT32_MAX ? 0 : -1;
}
