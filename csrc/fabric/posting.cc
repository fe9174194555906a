#include "posting.h"

namespace epcomm::fabric {

namespace {

/// Never waits: room has been seen before.
struct NoWait {
    static bool again() { return false; }
};

/// The end of what will never be posted: it is reported with the queue's error.
constexpr uint64_t kNowhere = ~uint64_t(0);

}  // namespace

Posting::Posting(const Plan& plan, const Ibgda& fabric, uint64_t* bell)
    : fabric_(fabric),
      bell_(bell),
      queues_of_(size_t(plan.num_lanes)),
      under_way_(size_t(fabric.num_nodes * fabric.num_channels)) {
    for (int32_t channel = 0; channel < fabric.num_channels; ++channel) {
        for (int32_t peer = 0; peer < fabric.num_nodes; ++peer) {
            if (peer == fabric.node) continue;
            queues_of_[size_t(plan.lane_of(channel))].push_back(peer * fabric.num_channels +
                                                                channel);
        }
    }
}

size_t Posting::post(int32_t lane, const Operation* operations, size_t count) {
    size_t accepted = 0;
    while (accepted < count && post_one(operations[accepted])) ++accepted;
    if (accepted == 0) return 0;
    for (const int32_t index : queues_of_[size_t(lane)]) mlx5::ring(queue_at(fabric_, index));
    // Release: whoever acquires it finds all doorbells, records and requests before it.
    if (bell_ != nullptr) __atomic_fetch_add(bell_, 1, __ATOMIC_RELEASE);
    return accepted;
}

size_t Posting::poll(int32_t lane, Completion* completions, size_t capacity) {
    size_t count = 0;
    for (const int32_t index : queues_of_[size_t(lane)]) {
        mlx5::SendQueue* queue = queue_at(fabric_, index);
        std::deque<UnderWay>& under_way = under_way_[size_t(index)];
        if (under_way.empty()) continue;
        const bool works = mlx5::poll(queue);
        while (count < capacity && !under_way.empty()) {
            const bool ok = under_way.front().end <= load_acquire(&queue->done);
            if (works && !ok) break;
            completions[count++] = {under_way.front().token, ok, ok ? 0 : vendor_of(*queue),
                                    queue->number};
            under_way.pop_front();
        }
    }
    return count;
}

/// False: there is no room now.
bool Posting::post_one(const Operation& operation) {
    const Command& command = operation.command;
    const Lane lane = {command.peer, command.channel};
    mlx5::SendQueue* queue = queue_of(fabric_, lane);
    const bool empty =
        command.op == EPCOMM_FABRIC_NOOP || (command.op == EPCOMM_FABRIC_PUT && command.bytes == 0);
    uint64_t end = queue->reserved;
    if (!empty && mlx5::works(*queue)) {
        Requests requests = requests_of(fabric_, lane, command, true);
        // What the peer may not have its NIC refuses; there is no count of it here.
        if (command.signal >= fabric_.num_signals) requests.raised = &unknown_signal_;
        if (!mlx5::has_room(*queue, end + requests.count())) return false;
        NoWait wait;
        end = fabric::post(queue, requests, mlx5::Ring::kWhenDue, wait);
    } else if (!empty) {
        end = kNowhere;
    }
    under_way_[size_t(lane.peer * fabric_.num_channels + lane.channel)].push_back(
        {operation.token, end});
    return true;
}

}  // namespace epcomm::fabric
