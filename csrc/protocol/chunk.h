/// How the records from one rank to one node are numbered, cut into chunks and placed in staging.
///
/// Records to a node are numbered in the order of their tokens; record j has slot j, and belongs to
/// chunk j / C. A chunk is what one put carries. What comes back in a combine uses the same places
/// and signals the other way round.
///
/// Staging *holds* W chunks of a peer, in each direction: chunk c lies at place c % W, at the
/// sender and at the receiver. A place has a signal at the receiver, which grows by one with every
/// chunk that comes to it, over all calls; so nothing is asked of the order in which chunks arrive.
/// As a rule W is all the chunks that a call can have, and every record has a place of its own.
///
/// *Bounded* staging holds fewer. Then a place is used several times in a call, and has a second
/// signal, at the sender: its *credit*, which grows by one when the receiver has read a chunk there
/// that another of the same call follows. Lap u of a place, its chunk u * W + place, is written, in
/// either rank's staging, once u credits of the call have come. The last chunk at a place brings
/// none: no credit is under way when a call has ended.
///
/// A rank's staging has an area for each of its N - 1 peers, in node order.
///
/// Where staging is not bounded, a sender writes its first records to each peer *ahead*: before it
/// knows that all ranks take part in the call, while their announcements are under way. Its last
/// call's chunks may still be on their way then: nothing but the peers' announcements says that
/// they have come. So behind the areas of all peers, region SEND has two more places for the first
/// chunk to each, used in turn by the parity of the epoch. What was sent from one two calls ago has
/// come: its receiver announced the call between after it, and that announcement ended this rank's.
#pragma once

#include "fabric.h"
#include "host_device.h"
#include "limits.h"
#include "record.h"

typedef struct {
    int32_t num_nodes;      ///< N
    int32_t node;           ///< of this rank
    int32_t max_records;    ///< slots of a peer
    int32_t chunk_records;  ///< C
    int32_t num_chunks;     ///< of a peer in a call, at most
    int32_t held_chunks;    ///< W; less than num_chunks: staging is bounded
    int32_t num_channels;   ///< what is about place w travels on channel w % num_channels
    int32_t ahead_records;  ///< first slots of a peer that are written ahead; 0: none
    int64_t peer_bytes;     ///< staging of a peer, in one direction
    int64_t ahead_bytes;    ///< of its first slots in one call, at the sender
} epcomm_chunking;

/// What came of planning.
typedef enum {
    EPCOMM_PLAN_OK = 0,
    EPCOMM_PLAN_TOO_LARGE = 1,  ///< the fabric's fields are too narrow
    EPCOMM_PLAN_TOO_SMALL = 2,  ///< the bytes allowed do not hold the shortest chunk of each peer
} epcomm_plan;

/// A slot of some peer's, as an item of work.
typedef struct {
    int32_t step;  ///< which peer: 0 to N - 2
    int32_t slot;
} epcomm_chunk_item;

/// Where a slot is, for a rank that receives in it (`signal`) or at either end (`offset`).
typedef struct {
    int32_t chunk;
    int32_t lap;
    int32_t channel;
    int32_t signal;           ///< raised here when `peer`'s chunk has come
    int32_t credit_signal;    ///< raised here when `peer` has read a chunk at that place
    int32_t announce_signal;  ///< raised here when `peer`'s announcement has come
    int64_t offset;           ///< bytes, in this rank's staging
    int64_t send_offset[2];   ///< the same in region SEND, by the parity of the epoch
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

/// Whether a place of staging is used several times in a call.
EPCOMM_HD static inline int32_t epcomm_is_bounded(const epcomm_chunking* chunking) {
    return chunking->held_chunks < chunking->num_chunks;
}

/// Where a chunk lies in staging.
EPCOMM_HD static inline int32_t epcomm_chunk_place(const epcomm_chunking* chunking, int32_t chunk) {
    return chunk % chunking->held_chunks;
}

/// How many chunks of the call have lain there before it.
EPCOMM_HD static inline int32_t epcomm_chunk_lap(const epcomm_chunking* chunking, int32_t chunk) {
    return chunk / chunking->held_chunks;
}

/// Chunks of `chunks` that lie at `place`, one after the other.
EPCOMM_HD static inline int32_t epcomm_num_laps(const epcomm_chunking* chunking, int32_t chunks,
                                                int32_t place) {
    return (chunks - place + chunking->held_chunks - 1) / chunking->held_chunks;
}

/// A slot counted from the start of a peer's staging.
EPCOMM_HD static inline int32_t epcomm_staging_slot(const epcomm_chunking* chunking, int32_t slot) {
    return slot % (chunking->held_chunks * chunking->chunk_records);
}

/// Byte offset, in the staging of a rank on `node`, of a staging slot of `peer`.
EPCOMM_HD static inline int64_t epcomm_slot_offset(const epcomm_chunking* chunking, int32_t node,
                                                   int32_t peer, int32_t slot,
                                                   int64_t record_bytes) {
    return epcomm_peer_index(node, peer) * chunking->peer_bytes + slot * record_bytes;
}

/// The same of a slot to `peer`, in region SEND.
EPCOMM_HD static inline int64_t epcomm_send_offset(const epcomm_chunking* chunking, int32_t node,
                                                   int32_t peer, int32_t slot, int64_t record_bytes,
                                                   uint64_t epoch) {
    if (slot >= chunking->ahead_records) {
        return epcomm_slot_offset(chunking, node, peer, slot, record_bytes);
    }
    const int64_t peers = chunking->num_nodes - 1;
    const int64_t place = (int64_t)(epoch & 1) * peers + epcomm_peer_index(node, peer);
    return peers * chunking->peer_bytes + place * chunking->ahead_bytes + slot * record_bytes;
}

/// Signals of a rank: one a peer for announcements, then one for each place of each peer; then, in
/// bounded staging, a credit for each place of each peer.
EPCOMM_HD static inline int64_t epcomm_num_signals(int64_t num_nodes, int64_t held_chunks,
                                                   int32_t bounded) {
    return (num_nodes - 1) * (1 + (bounded ? 2 : 1) * held_chunks);
}

/// Signal that `peer` raises at a rank on `node` for its announcement.
EPCOMM_HD static inline int32_t epcomm_announce_signal(int32_t node, int32_t peer) {
    return epcomm_peer_index(node, peer);
}

/// Signal that `peer` raises at a rank on `node` for its chunk at `place`.
EPCOMM_HD static inline int32_t epcomm_chunk_signal(const epcomm_chunking* chunking, int32_t node,
                                                    int32_t peer, int32_t place) {
    return chunking->num_nodes - 1 + epcomm_peer_index(node, peer) * chunking->held_chunks + place;
}

/// Signal that `peer` raises at a rank on `node` when it has read that rank's chunk at `place`.
EPCOMM_HD static inline int32_t epcomm_credit_signal(const epcomm_chunking* chunking, int32_t node,
                                                     int32_t peer, int32_t place) {
    return (chunking->num_nodes - 1) * chunking->held_chunks +
           epcomm_chunk_signal(chunking, node, peer, place);
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

/// A chunk of bounded staging is shortened down to so many records, in order that staging holds so
/// many chunks of a peer: while one is under way, others are written and read.
enum { EPCOMM_SHORTEST_CHUNK = 4, EPCOMM_ENOUGH_CHUNKS = 4 };

/// Fill in `chunk_records`, the wanted length if it can be, `num_chunks`, `held_chunks`,
/// `peer_bytes`, `ahead_records` and `ahead_bytes`. `max_bytes`: of staging in both directions, or
/// 0: as much as there can be records. Returns an epcomm_plan; where that is TOO_SMALL,
/// `peer_bytes` is that of the least staging, which holds one chunk of `chunk_records`.
EPCOMM_HD static inline int32_t epcomm_plan_chunks(epcomm_chunking* chunking, int64_t record_bytes,
                                                   int32_t wanted_records, int64_t max_bytes) {
    const int64_t peers = chunking->num_nodes - 1, align = EPCOMM_LIMIT_window_align;
    if (wanted_records < 1 || chunking->max_records < 1 || chunking->num_nodes < 2 ||
        chunking->num_nodes > EPCOMM_FABRIC_MAX_NODES ||
        chunking->num_channels > EPCOMM_FABRIC_MAX_CHANNELS || chunking->num_channels < 1) {
        return EPCOMM_PLAN_TOO_LARGE;
    }
    int64_t records = wanted_records, held = chunking->max_records;
    if (max_bytes > 0) {
        const int64_t fit = max_bytes / (2 * peers) / align * align / record_bytes;
        held = fit < held ? fit : held;
    }
    const int32_t bounded = held < chunking->max_records;
    while (bounded && records > EPCOMM_SHORTEST_CHUNK && held / records < EPCOMM_ENOUGH_CHUNKS) {
        records =
            records / 2 > EPCOMM_SHORTEST_CHUNK ? records / 2 : (int64_t)EPCOMM_SHORTEST_CHUNK;
    }
    int32_t plan = EPCOMM_PLAN_OK;
    if (bounded && records > held) {
        plan = EPCOMM_PLAN_TOO_SMALL;
        records = records < chunking->max_records ? records : chunking->max_records;
        held = records;
    }
    // Longer ones where the fabric has too few signals.
    while (records < held && epcomm_num_signals(chunking->num_nodes, (held + records - 1) / records,
                                                bounded) > EPCOMM_FABRIC_MAX_SIGNALS) {
        records *= 2;
    }
    if (bounded) held = held / records * records;
    chunking->chunk_records = (int32_t)records;
    chunking->num_chunks = (int32_t)((chunking->max_records + records - 1) / records);
    chunking->held_chunks = (int32_t)((held + records - 1) / records);
    chunking->peer_bytes = epcomm_align(held * record_bytes, align);
    const int64_t ahead = records < held ? records : held;
    const int64_t ahead_bytes = epcomm_align(ahead * record_bytes, align);
    const int32_t has_room =
        max_bytes == 0 || 2 * peers * (chunking->peer_bytes + ahead_bytes) <= max_bytes;
    chunking->ahead_records = !bounded && has_room ? (int32_t)ahead : 0;
    chunking->ahead_bytes = chunking->ahead_records > 0 ? ahead_bytes : 0;
    // Items are counted in 32 bits.
    const int64_t items = (int64_t)chunking->num_chunks * records * peers;
    const int32_t fits =
        peers * (chunking->peer_bytes + 2 * chunking->ahead_bytes) <= EPCOMM_FABRIC_MAX_LOCAL &&
        items < INT32_MAX;
    return fits ? plan : EPCOMM_PLAN_TOO_LARGE;
}
