// One look at a queue pair, by whichever engine: everything that is due now, in order.
#pragma once

#include "land.h"

namespace epcomm::emulated {

/// Where a queue pair's parts lie; see mlx5::SendQueue.
struct QueueMemory {
    const mlx5::Block* ring;
    const mlx5::Be32* record;
    const uint64_t* doorbell;
    mlx5::Completion* completions;
    uint32_t num_blocks;
    uint32_t num_completions;
    uint64_t start = 0;  ///< position that all counters start at; 0 on hardware
    uint32_t domain = 1;
    uint32_t max_responses = kMaxResponses;
};

/// Register memory with an NIC; returns its key, 0 if there is no room. Keys and queue pairs are
/// made before the network runs.
inline uint32_t add_key(Nic* nic, const Key& key) {
    if (nic->num_keys == kMaxKeys) return 0;
    nic->keys[nic->num_keys] = key;
    return kFirstKey + nic->num_keys++;
}

/// Make an NIC's next queue pair, not connected; returns its number, 0 if there is no room.
inline uint32_t add_queue(Nic* nic, uint32_t domain) {
    if (nic->num_queues == kMaxQueues) return 0;
    nic->queues[nic->num_queues] = {kReset, domain, 0, 0};
    return kFirstQueue + nic->num_queues++;
}

/// The engine's side of a queue pair; it brings memory for its flights and shadows.
inline QueuePair queue_pair(const QueueMemory& memory, uint32_t number, QueueEntry* entry,
                            Flight* flights, mlx5::Block* shadow) {
    QueuePair queue = {};
    queue.ring = memory.ring;
    queue.record = memory.record;
    queue.doorbell = memory.doorbell;
    queue.completions = memory.completions;
    queue.num_blocks = memory.num_blocks;
    queue.num_completions = memory.num_completions;
    queue.number = number;
    queue.max_responses = memory.max_responses;
    queue.entry = entry;
    queue.flights = flights;
    queue.num_flights = memory.num_blocks;
    queue.shadow = shadow;
    reset(&queue, memory.start);
    return queue;
}

/// Whether the queue pair has been connected, or connect it: by one lane.
EPCOMM_HD inline bool is_connected(QueuePair* queue) {
    if (queue->state != kReset) return true;
    const uint32_t state = fabric::load_acquire(&queue->entry->state);
    if (state == kReset) return false;
    queue->domain = queue->entry->domain;
    queue->peer_nic = queue->entry->peer_nic;
    queue->peer_number = queue->entry->peer_number;
    queue->state = state;
    return true;
}

/// Do what is due on a connected queue pair of an NIC that lives. `doorbell` is what its doorbell
/// holds, acquired by a lane before the last `sync`.
template <class Group, class Copier>
EPCOMM_HD inline void step(Group group, Context* context, QueuePair* queue, uint64_t doorbell,
                           Copier& copier) {
    if (group.lane() == 0) look_at_doorbell(context, queue, doorbell);
    group.sync();
    if (queue->state == kReady) fetch(group, context, queue);
    if (queue->state == kReady) land(group, context, queue, copier);
    if (context->progress) copier.refresh(group, context);  // it may be due by now
    if (queue->state == kReady) complete(group, context, queue);
    if (queue->state == kFailed) {
        if (group.lane() == 0) flush_all(context, queue);
        group.sync();
    }
}

/// Once writers are done: record and doorbell must be at the same index. By one lane.
EPCOMM_HD inline void check_idle(Context* context, QueuePair* queue) {
    if (queue->state != kReady) return;
    const uint32_t record = load_record(*queue, mlx5::kSendRecord);
    if (load_record(*queue, mlx5::kReceiveRecord) != 0) {
        violate(context, queue, queue->posted, kReceiveRecord);
    } else if (record != (queue->posted & 0xffff)) {
        violate(context, queue, queue->posted, kRecordWrong);
    }
}

}  // namespace epcomm::emulated
