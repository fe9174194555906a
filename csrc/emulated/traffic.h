// What an NIC's queue pairs sent, and whether the model or the copier was the limit.
#pragma once

#include "queue_pair.h"

namespace epcomm::emulated {

/// A message is counted as late if the copier was behind the model by more.
constexpr uint64_t kToleranceNs = 500;

struct Traffic {
    uint64_t messages = 0;
    uint64_t payload_bytes = 0;
    uint64_t wire_bytes = 0;
    uint64_t late_messages = 0;  ///< placed later than the model by more than the tolerance
    uint64_t late_copies = 0;    ///< of these, because their bytes were; others were looked at late
    Picoseconds worst_late = 0;
    Picoseconds total_late = 0;  ///< of all messages, also within the tolerance
    Picoseconds first_depart = kNever;
    Picoseconds last_arrive = 0;  ///< in the model
    Picoseconds last_placed = 0;  ///< in fact
    // Of messages of more than a packet, which carry data: announcements go ahead of them.
    Picoseconds data_depart = kNever;
    Picoseconds data_arrive = 0;  ///< in the model
    Picoseconds data_placed = 0;  ///< in fact

    /// A message has landed.
    EPCOMM_HD void add(const Context& context, const Flight& flight, uint64_t tolerance_ns) {
        messages += 1;
        payload_bytes += flight.request.bytes;
        wire_bytes += emulated::wire_bytes(context.own().line, flight.request.bytes);
        const Schedule& times = flight.times;
        if (times.depart < first_depart) first_depart = times.depart;
        if (times.arrive > last_arrive) last_arrive = times.arrive;
        if (context.now > last_placed) last_placed = context.now;
        if (flight.request.bytes > context.own().line.packet_bytes) {
            if (times.depart < data_depart) data_depart = times.depart;
            if (times.arrive > data_arrive) data_arrive = times.arrive;
            if (context.now > data_placed) data_placed = context.now;
        }
        // Atomics copy nothing; pieces are late on purpose.
        if (flight.request.is_atomic() || flight.num_pieces > 1) return;
        // Where there are faults, a message may also wait for an earlier one.
        const Picoseconds placed = context.faults.num_rules == 0 ? context.now : flight.copied_at;
        const Picoseconds late = placed > times.arrive ? placed - times.arrive : 0;
        if (late > worst_late) worst_late = late;
        total_late += late;
        const Picoseconds in_time = times.arrive + tolerance_ns * kNanosecond;
        late_messages += placed > in_time;
        late_copies += placed > in_time && flight.body_placed != 0 && flight.copied_at > in_time;
    }

    /// With those of other lanes or blocks.
    void add(const Traffic& other) {
        messages += other.messages;
        payload_bytes += other.payload_bytes;
        wire_bytes += other.wire_bytes;
        late_messages += other.late_messages;
        late_copies += other.late_copies;
        total_late += other.total_late;
        if (other.worst_late > worst_late) worst_late = other.worst_late;
        if (other.first_depart < first_depart) first_depart = other.first_depart;
        if (other.last_arrive > last_arrive) last_arrive = other.last_arrive;
        if (other.last_placed > last_placed) last_placed = other.last_placed;
        if (other.data_depart < data_depart) data_depart = other.data_depart;
        if (other.data_arrive > data_arrive) data_arrive = other.data_arrive;
        if (other.data_placed > data_placed) data_placed = other.data_placed;
    }

    /// Where the copier was the limit, times say nothing about the modelled network. A message that
    /// was looked at late, its bytes in place, is like one of a network with more latency, as
    /// `total_late` says; it leaves the rate what it is.
    bool model_was_the_limit() const { return late_copies * 100 <= messages; }
};

}  // namespace epcomm::emulated
