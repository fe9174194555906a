// The numbering of records and chunks for Python.

#include "epcomm.h"

extern "C" {

int epcomm_make_chunking(epcomm_chunking* chunking, int64_t record_bytes, int32_t chunk_records) {
    return epcomm_plan_chunks(chunking, record_bytes, chunk_records);
}

void epcomm_find_slot(const epcomm_chunking* chunking, int32_t peer, int32_t slot,
                      int64_t record_bytes, epcomm_slot_place* place) {
    place->chunk = slot / chunking->chunk_records;
    place->channel = place->chunk % chunking->num_channels;
    place->signal = epcomm_chunk_signal(chunking, chunking->node, peer, place->chunk);
    place->announce_signal = epcomm_announce_signal(chunking->node, peer);
    place->offset = epcomm_slot_offset(chunking, chunking->node, peer, slot, record_bytes);
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
