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
    while (true) yield();
}

#ifdef __x86_64__
/// What the other side keeps across a call; a coroutine's first place looks as if it had called.
asm(R"(
    .text
    .globl emulation_change_place
    .type emulation_change_place, @function
emulation_change_place:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulation_change_place, .-emulation_change_place
)");

void make_place(Fiber& fiber) {
    auto end = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStack) / 16 * 16;
    auto* top = reinterpret_cast<void**>(end);
    *--top = nullptr;  // where start_fiber would return to
    *--top = reinterpret_cast<void*>(start_fiber);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.place = top;
}
#else
void make_place(Fiber& fiber) {
    getcontext(&fiber.place);
    fiber.place.uc_stack.ss_sp = fiber.stack.get();
    fiber.place.uc_stack.ss_size = kStack;
    fiber.place.uc_link = nullptr;
    makecontext(&fiber.place, start_fiber, 0);
}
#endif

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

void open_block(Block& of) {
    const int threads = int(of.block_dim.x);
    make_meeting(of.all, threads);
    of.warps.resize(threads / 32);
    for (Meeting& warp : of.warps) make_meeting(warp, 32);
    of.fibers.resize(threads);
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = of.fibers[i];
        fiber.thread.x = unsigned(i);
        fiber.done = false;
        fiber.waits_on = nullptr;
        if (!fiber.stack) fiber.stack.reset(new char[kStack]);
        make_place(fiber);
    }
    of.left = threads;
}

/// Warps in a random order, the lanes of one from a random one on.
void run_once(Block& of) {
    block = &of;
    of.order.resize(of.warps.size());
    for (size_t w = 0; w < of.order.size(); ++w) of.order[w] = int(w);
    std::shuffle(of.order.begin(), of.order.end(), of.random);
    for (const int w : of.order) {
        const unsigned first = unsigned(of.random() % 32);
        for (unsigned i = 0; i < 32; ++i) {
            Fiber& fiber = of.fibers[w * 32 + (first + i) % 32];
            if (fiber.done) continue;
            if (fiber.waits_on != nullptr && *fiber.waits_on == fiber.waits_while) continue;
            of.current = &fiber;
            change_place(&of.scheduler, &fiber.place);
            of.left -= fiber.done;
        }
    }
    block = nullptr;
}

void run_block(Block& of) {
    open_block(of);
    while (of.left > 0) {
        run_once(of);
        sched_yield();
    }
}

void run_blocks(int count, int warps, uint64_t seed, const void* kernel,
                void (*run)(const void* kernel)) {
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::thread> threads;
    for (int b = 0; b < count; ++b) {
        auto one = std::make_unique<Block>();
        one->block.x = unsigned(b);
        one->block_dim.x = unsigned(32 * warps);
        one->grid_dim.x = unsigned(count);
        one->random.seed(seed * 31 + unsigned(b));
        one->kernel = kernel;
        one->run = run;
        threads.emplace_back([of = one.get()] { run_block(*of); });
        blocks.push_back(std::move(one));
    }
    for (std::thread& thread : threads) thread.join();
}

}  // namespace emulation
