// Tells Python the layouts of the fabric's structures and its integers.

#include "../host/describe.h"

#include "epcomm_fabric.h"

namespace {

#define FIELD(structure, field)                                   \
    epcomm::describe<decltype(epcomm_fabric_##structure::field)>( \
        #structure, #field, offsetof(epcomm_fabric_##structure, field))
#define OTHER_FIELD(structure, field)                                         \
    epcomm::describe<decltype(epcomm_##structure::field)>(#structure, #field, \
                                                          offsetof(epcomm_##structure, field))
#define END(name, type) epcomm_field{name, "", uint32_t(sizeof(type)), 0, 0, 'u'}

constexpr epcomm_field kFields[] = {
    FIELD(config, node),
    FIELD(config, num_nodes),
    FIELD(config, num_channels),
    FIELD(config, num_rings),
    FIELD(config, num_threads),
    FIELD(config, num_slots),
    FIELD(config, max_in_flight),
    FIELD(config, spin),
    FIELD(config, device_fills),
    FIELD(config, max_messages),
    FIELD(config, longest_nap_ns),
    FIELD(config, timeout_ns),
    FIELD(config, host_memory),
    FIELD(config, producer_memory),
    END("config", epcomm_fabric_config),
    FIELD(region, id),
    FIELD(region, device),
    FIELD(region, fd),
    FIELD(region, pointer),
    FIELD(region, bytes),
    FIELD(region, fd_offset),
    END("region", epcomm_fabric_region),
    FIELD(place, region),
    FIELD(place, offset),
    END("place", epcomm_fabric_place),
    FIELD(error, status),
    FIELD(error, vendor),
    FIELD(error, peer),
    FIELD(error, channel),
    FIELD(error, op),
    FIELD(error, queue_pair),
    FIELD(error, bytes),
    FIELD(error, position),
    FIELD(error, text),
    END("error", epcomm_fabric_error),
    FIELD(loss, peer),
    FIELD(loss, plane),
    FIELD(loss, channel),
    FIELD(loss, vendor),
    FIELD(loss, queue_pair),
    FIELD(loss, position),
    END("loss", epcomm_fabric_loss),
    FIELD(state, failed),
    FIELD(state, failing),
    FIELD(state, error),
    FIELD(state, threads),
    FIELD(state, consumers),
    FIELD(state, num_losses),
    FIELD(state, losses),
    END("state", epcomm_fabric_state),
    FIELD(probe, fabric),
    FIELD(probe, out),
    FIELD(probe, in),
    FIELD(probe, signals),
    FIELD(probe, result),
    FIELD(probe, local),
    FIELD(probe, remote),
    FIELD(probe, bytes),
    FIELD(probe, epoch),
    FIELD(probe, timeout_ns),
    FIELD(probe, peer),
    FIELD(probe, num_chunks),
    FIELD(probe, num_channels),
    FIELD(probe, first_signal),
    FIELD(probe, their_signal),
    FIELD(probe, num_blocks),
    FIELD(probe, num_threads),
    FIELD(probe, triggers),
    FIELD(probe, round_trip),
    FIELD(probe, leads),
    END("probe", epcomm_fabric_probe),
    OTHER_FIELD(proxy_thread, heartbeat),
    OTHER_FIELD(proxy_thread, triggers),
    OTHER_FIELD(proxy_thread, busy_ns),
    OTHER_FIELD(proxy_thread, asleep),
    OTHER_FIELD(proxy_thread, running),
    END("proxy_thread", epcomm_proxy_thread),
    OTHER_FIELD(ring, slots),
    OTHER_FIELD(ring, producer),
    OTHER_FIELD(ring, consumer),
    OTHER_FIELD(ring, num_slots),
    END("ring", epcomm_ring),
    OTHER_FIELD(ring_consumer, tail),
    OTHER_FIELD(ring_consumer, completed),
    END("ring_consumer", epcomm_ring_consumer),
    OTHER_FIELD(fabric, rings),
    OTHER_FIELD(fabric, state),
    OTHER_FIELD(fabric, timeout_ns),
    OTHER_FIELD(fabric, num_rings),
    OTHER_FIELD(fabric, num_threads),
    OTHER_FIELD(fabric, num_channels),
    OTHER_FIELD(fabric, num_nodes),
    OTHER_FIELD(fabric, node),
    END("fabric", epcomm_fabric),
    FIELD(traffic, messages),
    FIELD(traffic, payload_bytes),
    FIELD(traffic, wire_bytes),
    FIELD(traffic, late_messages),
    FIELD(traffic, late_copies),
    FIELD(traffic, total_late_ns),
    FIELD(traffic, worst_late_ns),
    FIELD(traffic, data_depart_ns),
    FIELD(traffic, data_arrive_ns),
    FIELD(traffic, data_placed_ns),
    FIELD(traffic, copier_was_the_limit),
    FIELD(traffic, num_nics),
    FIELD(traffic, bytes_per_ns),
    FIELD(traffic, latency_ns),
    FIELD(traffic, packet_bytes),
    FIELD(traffic, header_bytes),
    END("traffic", epcomm_fabric_traffic),
    FIELD(message, rung_ns),
    FIELD(message, depart_ns),
    FIELD(message, arrive_ns),
    FIELD(message, landed_ns),
    FIELD(message, completed_ns),
    FIELD(message, position),
    FIELD(message, bytes),
    FIELD(message, queue_pair),
    FIELD(message, peer),
    FIELD(message, channel),
    FIELD(message, plane),
    END("message", epcomm_fabric_message),
    OTHER_FIELD(region_key, address),
    OTHER_FIELD(region_key, bytes),
    OTHER_FIELD(region_key, key),
    END("region_key", epcomm_region_key),
    OTHER_FIELD(ibgda_probe, ibgda),
    OTHER_FIELD(ibgda_probe, result),
    OTHER_FIELD(ibgda_probe, local),
    OTHER_FIELD(ibgda_probe, remote),
    OTHER_FIELD(ibgda_probe, bytes),
    OTHER_FIELD(ibgda_probe, timeout_ns),
    OTHER_FIELD(ibgda_probe, peer),
    OTHER_FIELD(ibgda_probe, channel),
    OTHER_FIELD(ibgda_probe, signal),
    OTHER_FIELD(ibgda_probe, other_signal),
    OTHER_FIELD(ibgda_probe, rounds),
    END("ibgda_probe", epcomm_ibgda_probe),
    OTHER_FIELD(ibgda, queues),
    OTHER_FIELD(ibgda, local),
    OTHER_FIELD(ibgda, remote),
    OTHER_FIELD(ibgda, state),
    OTHER_FIELD(ibgda, timeout_ns),
    OTHER_FIELD(ibgda, num_channels),
    OTHER_FIELD(ibgda, num_nodes),
    OTHER_FIELD(ibgda, num_planes),
    OTHER_FIELD(ibgda, node),
    OTHER_FIELD(ibgda, num_signals),
    OTHER_FIELD(ibgda, failover),
    OTHER_FIELD(ibgda, raised),
    END("ibgda", epcomm_ibgda),
};

constexpr epcomm_constant kConstants[] = {
#define LIMIT(name, value) {#name, EPCOMM_FABRIC_##name},
    EPCOMM_FABRIC_LIMITS(LIMIT)
#undef LIMIT
#define ENUMERATOR(name) {#name, EPCOMM_FABRIC_##name}
        ENUMERATOR(SIGNALS),
    ENUMERATOR(NOOP),
    ENUMERATOR(PUT),
    ENUMERATOR(PUT_SIGNAL),
    ENUMERATOR(SIGNAL_ADD),
    ENUMERATOR(OK),
    ENUMERATOR(TRANSPORT),
    ENUMERATOR(BAD_TRIGGER),
    ENUMERATOR(RING_FULL),
    ENUMERATOR(STALLED),
    ENUMERATOR(STOPPED),
    ENUMERATOR(KIND_PROXY),
    ENUMERATOR(KIND_IBGDA),
    ENUMERATOR(MAX_LOSSES),
#undef ENUMERATOR
};

}  // namespace

extern "C" {

const epcomm_field* epcomm_fabric_fields(uint32_t* count) {
    *count = sizeof kFields / sizeof kFields[0];
    return kFields;
}

const epcomm_constant* epcomm_fabric_constants(uint32_t* count) {
    *count = sizeof kConstants / sizeof kConstants[0];
    return kConstants;
}

}  // extern "C"
