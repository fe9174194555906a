// Send queues that host threads fill and a device serves: where they lie.
//
// Requests and completions lie in host memory that both reach. A device reads that over PCIe, and
// warps that do so all the time hold up whatever else crosses it: triggers, completions, the host's
// flags. So the engine looks at doorbells and records of its own, in device memory, and one warp of
// it carries the host's there (bells.cuh): it looks at one word, the *bell*, and at nothing else
// until that has grown. As a real NIC the engine reads requests only after a doorbell.
//
//     host      requests; per queue record, then doorbell; then the bell
//     device    bell -> all doorbells -> the records of those that changed -> requests
#pragma once

#include "../mlx5/queue.h"

namespace epcomm::emulated {

/// Offsets in the host memory, and the places in it.
struct HostQueues {
    uint64_t bell, doorbells, records, rings, completions, bytes;

    HostQueues(uint32_t num_queues, uint32_t depth) : depth_(depth) {
        uint64_t next = 0;
        const auto take = [&next](uint64_t size) {
            const uint64_t at = next;
            next += (size + 127) / 128 * 128;
            return at;
        };
        bell = take(sizeof(uint64_t));
        doorbells = take(sizeof(uint64_t) * num_queues);
        records = take(sizeof(uint64_t) * num_queues);
        rings = take(sizeof(mlx5::Block) * depth * num_queues);
        completions = take(sizeof(mlx5::Completion) * depth * num_queues);
        bytes = next;
    }

    uint64_t ring(uint32_t queue) const {
        return rings + sizeof(mlx5::Block) * depth_ * uint64_t(queue);
    }
    uint64_t completion(uint32_t queue) const {
        return completions + sizeof(mlx5::Completion) * depth_ * uint64_t(queue);
    }

    /// Give a queue its memory, empty; its number and counters are the caller's.
    void place(void* start, uint32_t index, mlx5::SendQueue* queue) const {
        auto* memory = static_cast<uint8_t*>(start);
        queue->ring = reinterpret_cast<mlx5::Block*>(memory + ring(index));
        queue->completions = reinterpret_cast<mlx5::Completion*>(memory + completion(index));
        queue->record = reinterpret_cast<mlx5::Be32*>(memory + records) + index * kRecordStep;
        queue->doorbell = reinterpret_cast<uint64_t*>(memory + doorbells) + index;
        queue->num_blocks = queue->num_completions = depth_;
        for (uint32_t i = 0; i < depth_; ++i) {
            queue->completions[i].opcode_owner = mlx5::kInvalid << 4;
        }
    }

 private:
    static constexpr uint32_t kRecordStep = mlx5::kRecordWords;
    static_assert(kRecordStep * sizeof(mlx5::Be32) == sizeof(uint64_t), "a record is one word");

    uint32_t depth_;
};

/// The engine's own doorbells and records lie so many words apart.
constexpr uint32_t kOwnStep = 8;

/// What carries doorbells; plain data.
struct HostBells {
    // In host memory, as the device reaches it.
    const uint64_t* bell;  ///< null: all queues are filled by the device
    const uint64_t* doorbells;
    const uint64_t* records;
    // In device memory, kOwnStep words apart; zeros at the start.
    uint64_t* own_doorbells;
    uint64_t* own_records;
    uint32_t num_queues;

    /// Of queues that `memory` names and host memory from `start` on.
    void set_host(const HostQueues& memory, const void* start, uint32_t count) {
        const auto* base = static_cast<const uint8_t*>(start);
        bell = reinterpret_cast<const uint64_t*>(base + memory.bell);
        doorbells = reinterpret_cast<const uint64_t*>(base + memory.doorbells);
        records = reinterpret_cast<const uint64_t*>(base + memory.records);
        num_queues = count;
    }
};

}  // namespace epcomm::emulated
