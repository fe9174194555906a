// Doorbell registers, and who stores to them.
//
// A register is 8 bytes of the card; a doorbell names its queue pair, so queue pairs may share one.
// Three ways lead from `SendQueue::doorbell` to it, and the code that rings is the same for all:
//
//   host      producers are threads of this process and store to the register itself
//   gpu       the register is mapped into the GPU, and a kernel stores to it
//   cpu       the doorbell is a word of host memory that kernels reach. A thread of this process
//             (Ringer) stores to the register what it finds there. Where the driver refuses the
//             mapping, and where the register is mapped write-combining, which needs a flush.
//
// WHY THE LAST WORD IS ENOUGH (cpu). A doorbell says "up to this index"; a later one says more. The
// record, which the card reads after a lost doorbell, lies in the queue's memory and is stored
// there by the producers, before the word: store, fence at system scope, store. The thread reads
// the word with acquire and fences before it stores on. So the card cannot see a doorbell before
// its requests or its record.
#pragma once

#include <atomic>
#include <thread>

#include "memory.h"

namespace epcomm::fabric::devx {

/// Who stores to the registers for producers on a GPU.
enum class DoorbellBy { kAuto, kGpu, kCpu };

/// A page of registers of a card.
class Register {
 public:
    /// Throws std::runtime_error if the card gives none.
    explicit Register(const Card& card);
    ~Register();
    Register(const Register&) = delete;
    Register& operator=(const Register&) = delete;

    uint32_t page() const { return uar_->page_id; }
    uint64_t* host() const { return static_cast<uint64_t*>(uar_->reg_addr); }
    bool combining() const { return combining_; }

    /// Map it into the GPU. Throws std::runtime_error where the driver refuses.
    void map(int32_t device);
    /// Where the GPU's threads store; null before `map`.
    uint64_t* gpu() const { return gpu_; }

 private:
    const Card& card_;
    Uar* uar_ = nullptr;
    bool combining_ = false;
    int32_t device_ = -1;
    uint64_t* gpu_ = nullptr;
};

/// As many registers as asked for, fewer if the card has no more; at least one.
std::vector<std::unique_ptr<Register>> make_registers(const Card& card, int32_t count);

/// Carries doorbells from words to registers.
class Ringer {
 public:
    /// For at most `count` words, in memory that producers on `device` (or the host's) can write.
    Ringer(int32_t device, uint32_t count);
    ~Ringer();
    Ringer(const Ringer&) = delete;
    Ringer& operator=(const Ringer&) = delete;

    /// A word whose doorbells go to `target`. Before start.
    uint64_t* add(uint64_t* target);
    bool empty() const { return words_.empty(); }
    void start();

 private:
    struct Word {
        const uint64_t* source;
        uint64_t* target;
        uint64_t carried;
    };
    bool carry();
    void run();

    int32_t device_;
    uint32_t count_;
    std::unique_ptr<Arena> memory_;
    std::vector<Word> words_;
    std::atomic<bool> stopping_{false};
    std::thread thread_;
};

}  // namespace epcomm::fabric::devx
