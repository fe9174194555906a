// Producers as fibers of one thread: wherever they race for the same thing, or wait, a seed decides
// who goes on. For programs compiled with EPCOMM_EMULATED (csrc/fabric/atomics.h).
#pragma once

#include <ucontext.h>

#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "give_way.h"

namespace rig {

class Fibers {
 public:
    explicit Fibers(uint64_t seed) : random_(uint32_t(seed)) {}

    void add(std::function<void()> run) {
        auto fiber = std::make_unique<Fiber>();
        fiber->run = std::move(run);
        fiber->stack.resize(64 * 1024);
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack.data();
        fiber->context.uc_stack.ss_size = fiber->stack.size();
        fiber->context.uc_link = nullptr;
        makecontext(&fiber->context, start, 0);
        fibers_.push_back(std::move(fiber));
    }

    /// Until all have ended; `between` is called between their steps. False: not within `limit`
    /// steps; then they must not be run again.
    bool run(const std::function<void()>& between, long limit) {
        size_t left = fibers_.size();
        while (left > 0 && limit-- > 0) {
            between();
            Fiber& fiber = *fibers_[random_() % fibers_.size()];
            if (fiber.ended) continue;
            current_ = this;
            running_ = &fiber;
            swapcontext(&scheduler_, &fiber.context);
            current_ = nullptr;
            left -= fiber.ended;
        }
        return left == 0;
    }

    /// From inside a fiber.
    static void pause() {
        Fibers* all = current_;
        if (all != nullptr) swapcontext(&all->running_->context, &all->scheduler_);
    }
    /// Mostly on, as threads do.
    static void maybe_pause() {
        if (current_ != nullptr && current_->random_() % 4 == 0) pause();
    }

 private:
    struct Fiber {
        std::function<void()> run;
        std::vector<char> stack;
        ucontext_t context;
        bool ended = false;
    };

    static void start() {
        Fiber* fiber = current_->running_;
        fiber->run();
        fiber->ended = true;
        pause();
    }

    static inline Fibers* current_ = nullptr;  ///< null outside of a fiber, as in the NICs
    std::mt19937 random_;
    std::vector<std::unique_ptr<Fiber>> fibers_;
    Fiber* running_ = nullptr;
    ucontext_t scheduler_;
};

}  // namespace rig

// For the whole program, whose one source file includes this.
namespace emulation {

void give_way() { rig::Fibers::pause(); }
void maybe_give_way() { rig::Fibers::maybe_pause(); }

}  // namespace emulation
