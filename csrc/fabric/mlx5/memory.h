// Memory for queues and tables, where the producers run: a GPU's, or the host's.
#pragma once

#include <memory>

#include "card.h"

namespace epcomm::fabric::devx {

/// Zeroed memory that producers can use. It ends with the object.
class Arena {
 public:
    virtual ~Arena() = default;
    Arena() = default;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    /// The memory's start for the producers.
    virtual uint8_t* start() const = 0;
    /// The same for this process's threads; null where they cannot reach it.
    virtual uint8_t* host() const = 0;
    /// Copy into the memory and out of it. Throws std::runtime_error if CUDA does not.
    virtual void write(uint64_t offset, const void* from, uint64_t bytes) = 0;
    virtual void read(uint64_t offset, void* into, uint64_t bytes) const = 0;
};

/// Of the GPU `device`, aligned to pages of its own.
std::unique_ptr<Arena> make_gpu_arena(int32_t device, uint64_t bytes);
/// Of the host; with a `device` (not -1) locked and mapped into that GPU.
std::unique_ptr<Arena> make_host_arena(int32_t device, uint64_t bytes);
/// Where producers run: on the GPU `device`, or (-1) the host.
std::unique_ptr<Arena> make_producer_arena(int32_t device, uint64_t bytes);

/// Where queues may lie for producers on a GPU.
enum class QueuesIn {
    kAuto,  ///< the GPU's memory as a dma-buf, or by nvidia_peermem, else the host's
    kGpu,
    kHost,
};

/// Memory for queues, registered with one card.
class QueueMemory {
 public:
    /// Throws std::runtime_error with what each way said.
    QueueMemory(const Card& card, int32_t device, uint64_t bytes, QueuesIn wanted);
    ~QueueMemory();
    QueueMemory(const QueueMemory&) = delete;
    QueueMemory& operator=(const QueueMemory&) = delete;

    Arena& memory() const { return *memory_; }
    uint32_t umem() const { return umem_->umem_id; }
    /// What was chosen and why not the better ones.
    const std::string& report() const { return report_; }

 private:
    std::unique_ptr<Arena> memory_;
    Umem* umem_ = nullptr;
    std::string report_;
};

}  // namespace epcomm::fabric::devx
