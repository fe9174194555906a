// Allocates and maps doorbell registers; the thread that rings for a GPU.

#include "doorbell.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include <algorithm>
#include <stdexcept>

#include "../atomics.h"
#include "../verbs/cuda_driver.h"
#include "step.h"

namespace epcomm::fabric::devx {

namespace {

constexpr uint32_t kDoorbellBytes = 8;
constexpr uint64_t kWordStride = 64;  // a cache line each: the thread and a GPU take turns on it
/// A kernel cannot wake the thread: after this long without a doorbell a nap is worth its delay.
constexpr int64_t kIdleNs = 2'000'000;
constexpr int64_t kNapNs = 20'000;

/// What was stored before, by this thread or by one it has read from, reaches the card before what
/// follows; and what was stored to a write-combining register does not wait for more.
void order_for_device() {
#if defined(__x86_64__)
    __builtin_ia32_mfence();
#elif defined(__aarch64__)
    asm volatile("dsb sy" ::: "memory");
#else
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

}  // namespace

Register::Register(const Card& card) : card_(card) {
    for (const uint32_t type : {kUarNonCachedDedicated, kUarNonCached, kUarBlueFlame}) {
        uar_ = library().devx_alloc_uar(card.nic.context, type);
        combining_ = type == kUarBlueFlame;
        if (uar_ != nullptr) return;
    }
    fail(Step::kRegister, card.name(), strerror(errno));
}

Register::~Register() {
    if (gpu_ != nullptr) {
        try {
            const CudaContext context(device_);
            cuda_driver().host_unregister(uar_->reg_addr);
        } catch (const std::runtime_error&) {
            // At the end of the process the driver may have gone, and its mappings with it.
        }
    }
    library().devx_free_uar(uar_);
}

void Register::map(int32_t device) {
    const CudaDriver& cuda = cuda_driver();
    const CudaContext context(device);
    constexpr unsigned kPortable = 1, kMapped = 2, kIoMemory = 4;
    const uint32_t bytes = combining_ ? card_.limits.register_bytes : kDoorbellBytes;
    check_cuda(cuda.host_register(uar_->reg_addr, bytes, kPortable | kMapped | kIoMemory),
               "cuMemHostRegister");
    uint64_t mapped = 0;
    if (const int result = cuda.host_pointer(&mapped, uar_->reg_addr, 0); result != 0) {
        cuda.host_unregister(uar_->reg_addr);
        check_cuda(result, "cuMemHostGetDevicePointer");
    }
    device_ = device;
    gpu_ = reinterpret_cast<uint64_t*>(mapped);
}

std::vector<std::unique_ptr<Register>> make_registers(const Card& card, int32_t count) {
    std::vector<std::unique_ptr<Register>> registers;
    while (registers.size() < size_t(count)) {
        std::unique_ptr<Register> next;
        try {
            next = std::make_unique<Register>(card);
        } catch (const std::runtime_error&) {
            if (registers.empty()) throw;
            break;
        }
        // Of the kind that is one for all, the same came again.
        const auto same = [&next](const auto& other) { return other->page() == next->page(); };
        if (std::any_of(registers.begin(), registers.end(), same)) break;
        registers.push_back(std::move(next));
    }
    return registers;
}

Ringer::Ringer(int32_t device, uint32_t count) : device_(device), count_(count) {}

Ringer::~Ringer() {
    stopping_ = true;
    if (thread_.joinable()) thread_.join();
}

uint64_t* Ringer::add(uint64_t* target) {
    if (memory_ == nullptr) {
        try {
            memory_ = make_host_arena(device_, count_ * kWordStride);
        } catch (const std::runtime_error& error) {
            fail(Step::kProducerMemory, "words for doorbells", error.what());
        }
    }
    const uint64_t offset = words_.size() * kWordStride;
    words_.push_back({reinterpret_cast<uint64_t*>(memory_->host() + offset), target, 0});
    return reinterpret_cast<uint64_t*>(memory_->start() + offset);
}

bool Ringer::carry() {
    bool any = false;
    for (Word& word : words_) {
        const uint64_t value = load_acquire(word.source);
        if (value == word.carried) continue;
        word.carried = value;
        order_for_device();
        __atomic_store_n(word.target, value, __ATOMIC_RELAXED);
        order_for_device();
        any = true;
    }
    return any;
}

void Ringer::run() {
    int64_t last = now_ns();
    while (!stopping_.load(std::memory_order_relaxed)) {
        if (carry()) {
            last = now_ns();
        } else if (now_ns() - last < kIdleNs) {
            relax();
        } else {
            const timespec nap = {0, kNapNs};
            nanosleep(&nap, nullptr);
        }
    }
}

void Ringer::start() {
    thread_ = std::thread([this] { run(); });
}

}  // namespace epcomm::fabric::devx
