#include "cuda_emulation.h"

#include <sched.h>

#include <algorithm>

#include "give_way.h"

namespace epcomm {

/// Dynamic shared memory of a block, as kernels declare it.
thread_local uint8_t shared_bytes[192 * 1024] __align__(128);

}  // namespace epcomm

namespace emulation {

thread_local Block* block = nullptr;

namespace {

constexpr size_t kStack = 64 * 1024;

void start_fiber() {
    block->run(block->kernel);
    block->current->done = true;
    yield();
}

void make_meeting(Meeting& meeting, int size) {
    meeting.size = size;
    meeting.in.assign(size, 0);
    meeting.out.assign(size, 0);
}

}  // namespace

void give_way() {
    if (block == nullptr) {
        sched_yield();
    } else {
        yield();
    }
}

void maybe_give_way() {
    if (block != nullptr && block->random() % 4 == 0) yield();
}

/// Run one thread block to its end; on a thread of its own.
void run_block(Block& of) {
    block = &of;
    const int threads = int(of.block_dim.x);
    make_meeting(of.all, threads);
    of.warps.resize(threads / 32);
    for (Meeting& warp : of.warps) make_meeting(warp, 32);
    of.fibers.resize(threads);
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = of.fibers[i];
        fiber.thread.x = unsigned(i);
        fiber.stack = std::make_unique<char[]>(kStack);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, start_fiber, 0);
    }
    // Warps in a random order, the lanes of one from a random one on.
    std::vector<int> order(threads / 32);
    for (size_t w = 0; w < order.size(); ++w) order[w] = int(w);
    int left = threads;
    while (left > 0) {
        std::shuffle(order.begin(), order.end(), of.random);
        for (const int w : order) {
            const unsigned first = unsigned(of.random() % 32);
            for (unsigned i = 0; i < 32; ++i) {
                Fiber& fiber = of.fibers[w * 32 + (first + i) % 32];
                if (fiber.done) continue;
                of.current = &fiber;
                swapcontext(&of.scheduler, &fiber.context);
                left -= fiber.done;
            }
        }
        sched_yield();
    }
    block = nullptr;
}

}  // namespace emulation
