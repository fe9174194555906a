// The numbering of records and chunks for Python.

#include "epcomm.h"

extern "C" {

int epcomm_make_chunking(epcomm_chunking* chunking, int64_t record_bytes, int32_t chunk_records,
                         int64_t max_bytes) {
    return epcomm_plan_chunks(chunking, record_bytes, chunk_records, max_bytes);
}

void epcomm_find_slot(const epcomm_chunking* chunking, int32_t peer, int32_t slot,
                      int64_t record_bytes, epcomm_slot_place* place) {
    const int32_t node = chunking->node;
    place->chunk = slot / chunking->chunk_records;
    place->lap = epcomm_chunk_lap(chunking, place->chunk);
    const int32_t at = epcomm_chunk_place(chunking, place->chunk);
    place->channel = at % chunking->num_channels;
    place->signal = epcomm_chunk_signal(chunking, node, peer, at);
    place->credit_signal =
        epcomm_is_bounded(chunking) ? epcomm_credit_signal(chunking, node, peer, at) : -1;
    place->announce_signal = epcomm_announce_signal(node, peer);
    const int32_t held = epcomm_staging_slot(chunking, slot);
    place->offset = epcomm_slot_offset(chunking, node, peer, held, record_bytes);
    for (uint64_t epoch = 0; epoch < 2; ++epoch) {
        place->send_offset[epoch] =
            epcomm_send_offset(chunking, node, peer, held, record_bytes, epoch);
    }
}

void epcomm_find_item(const epcomm_chunking* chunking, int32_t item, epcomm_item_place* place) {
    const epcomm_chunk_item found = epcomm_item_of(chunking, item);
    place->slot = found.slot;
    place->send_node = epcomm_send_node(chunking, found.step);
    place->receive_node = epcomm_receive_node(chunking, found.step);
}

int32_t epcomm_count_items(const epcomm_chunking* chunking, int32_t records) {
    return epcomm_num_items(chunking, records);
}

}  // extern "C"
