// What an NIC sent, and what became of each message, as the fabric's users are told.
#pragma once

#include "../protocol/fabric.h"
#include "passage.h"
#include "traffic.h"

namespace epcomm::emulated {

/// Fill in all but `num_nics`. `epoch_ns`: time 0 of the model on the clock of the counts.
inline void fill_counts(const Traffic& seen, const LineModel& line, int64_t epoch_ns,
                        epcomm_fabric_traffic* into) {
    *into = {};
    into->messages = seen.messages;
    into->payload_bytes = seen.payload_bytes;
    into->wire_bytes = seen.wire_bytes;
    into->late_messages = seen.late_messages;
    into->late_copies = seen.late_copies;
    into->total_late_ns = seen.total_late / kNanosecond;
    into->worst_late_ns = seen.worst_late / kNanosecond;
    if (seen.data_arrive != 0) {
        into->data_depart_ns = epoch_ns + int64_t(seen.data_depart / kNanosecond);
        into->data_arrive_ns = epoch_ns + int64_t(seen.data_arrive / kNanosecond);
        into->data_placed_ns = epoch_ns + int64_t(seen.data_placed / kNanosecond);
    }
    into->copier_was_the_limit = seen.model_was_the_limit() ? 0 : 1;
    into->bytes_per_ns = line.bytes_per_ns;
    into->latency_ns = line.latency_ns;
    into->packet_bytes = line.packet_bytes;
    into->header_bytes = line.header_bytes;
}

/// All but `peer`, `channel` and `plane`.
inline epcomm_fabric_message message_of(const Passage& passage, int64_t epoch_ns) {
    const auto ns = [epoch_ns](Picoseconds time) {
        return time == 0 ? 0 : epoch_ns + int64_t(time / kNanosecond);
    };
    epcomm_fabric_message message{};
    message.rung_ns = ns(passage.rung);
    message.depart_ns = ns(passage.depart);
    message.arrive_ns = ns(passage.arrive);
    message.landed_ns = ns(passage.landed);
    message.completed_ns = ns(passage.completed);
    message.position = passage.position;
    message.bytes = passage.bytes;
    message.queue_pair = passage.queue;
    return message;
}

/// All but `peer`, `channel` and `plane`.
inline epcomm_fabric_event event_of(const Event& event, int64_t epoch_ns) {
    epcomm_fabric_event told{};
    told.time_ns = epoch_ns + int64_t(event.time / kNanosecond);
    told.amount_ps = event.amount;
    told.position = event.position;
    told.queue_pair = event.queue;
    told.kind = int32_t(event.kind);
    told.code = event.code;
    return told;
}

}  // namespace epcomm::emulated
