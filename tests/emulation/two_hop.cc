// The kernels of the two-hop path as host code, and a fabric whose proxies deliver as late and as
// disorderly as the fabric's promises allow. Built into a library that the tests drive from Python.
#include <algorithm>

#include "cuda_emulation.h"

#define EPCOMM_EMULATED 1
namespace epcomm {
// Dynamic shared memory of a block.
extern thread_local uint8_t shared_bytes[] __align__(128);
}  // namespace epcomm

#include "../../csrc/kernels/two_hop_combine.cuh"
#include "../../csrc/kernels/two_hop_dispatch.cuh"
#include "../../csrc/kernels/two_hop_layout.cuh"
#include "cuda_emulation.cc"

namespace epcomm {

thread_local uint8_t shared_bytes[192 * 1024] __align__(128);

}  // namespace epcomm

extern "C" {

void epcomm_fabric_wake(const epcomm_fabric*, int32_t) {}

int64_t epcomm_cuda_control_bytes(int32_t nodes, int32_t ranks, int32_t experts) {
    return epcomm::announced_offset({nodes, ranks, experts}) +
           ranks * int64_t(sizeof(epcomm_cuda_counter));
}

void epcomm_cuda_window_parts(const epcomm_cuda_row* row, int64_t rows, epcomm_cuda_parts* parts) {
    *parts = epcomm::window_parts(*row, rows);
}

/// One kernel launch of a rank's stream.
typedef struct {
    int32_t kind;  ///< 0 layout, 1 dispatch, 2 combine
    int32_t blocks;
    int32_t warps;
    int32_t delay_us;  ///< before it
    const void* call;
} emulated_launch;

/// A rank: its stream, and what its proxy serves.
typedef struct {
    const emulated_launch* launches;
    int32_t num_launches;
    int32_t node;
    const epcomm_fabric* fabric;
    uint8_t* const* regions;  ///< of this rank, by id
    const int32_t* rail;      ///< rank of this rail on every node
    int32_t silent_after;     ///< operations after which nothing is delivered; -1 = never
    int32_t reserved;
} emulated_rank;

}  // extern "C"

namespace {

using epcomm::fabric::Command;

template <typename Call, void (*kernel)(const Call)>
void run_kernel(const void* call) {
    kernel(*static_cast<const Call*>(call));
}

void (*kernel_of(const emulated_launch& launch))(const void*) {
    if (launch.kind == 0) {
        return run_kernel<epcomm_cuda_two_hop_layout, epcomm::two_hop_layout_kernel>;
    }
    if (launch.kind == 1) {
        const auto* call = static_cast<const epcomm_cuda_two_hop_dispatch*>(launch.call);
        const int input = call->call.input_format;
        using Call = epcomm_cuda_two_hop_dispatch;
        if (call->call.announcement.format == input) {
            return run_kernel<Call, epcomm::two_hop_dispatch_kernel<0>>;
        }
        return input == EPCOMM_FORMAT_BF16 ? run_kernel<Call, epcomm::two_hop_dispatch_kernel<1>>
                                           : run_kernel<Call, epcomm::two_hop_dispatch_kernel<2>>;
    }
    using Call = epcomm_cuda_two_hop_combine;
    const auto* call = static_cast<const Call*>(launch.call);
    const bool f32 = call->call.announcement.format == EPCOMM_FORMAT_F32;
    const bool wire = call->call.announcement.wire == EPCOMM_FORMAT_F32;
    if (f32) {
        return wire ? run_kernel<Call, epcomm::two_hop_combine_kernel<true, true>>
                    : run_kernel<Call, epcomm::two_hop_combine_kernel<true, false>>;
    }
    return wire ? run_kernel<Call, epcomm::two_hop_combine_kernel<false, true>>
                : run_kernel<Call, epcomm::two_hop_combine_kernel<false, false>>;
}

void run_launch(const emulated_launch& launch, uint64_t seed) {
    std::vector<std::unique_ptr<emulation::Block>> blocks;
    std::vector<std::thread> threads;
    for (int b = 0; b < launch.blocks; ++b) {
        auto block = std::make_unique<emulation::Block>();
        block->block.x = unsigned(b);
        block->block_dim.x = unsigned(32 * launch.warps);
        block->grid_dim.x = unsigned(launch.blocks);
        block->random.seed(seed * 31 + unsigned(b));
        block->kernel = launch.call;
        block->run = kernel_of(launch);
        threads.emplace_back([of = block.get()] { emulation::run_block(*of); });
        blocks.push_back(std::move(block));
    }
    for (std::thread& thread : threads) thread.join();
}

/// Takes triggers out of a rank's rings and carries them out in random order. Bytes are read and
/// written only then, and a signal follows its own bytes; nothing else is kept in order.
class Proxy {
 public:
    Proxy(const emulated_rank* ranks, int rank, uint64_t seed)
        : ranks_(ranks), me_(ranks[rank]), random_(seed) {}

    void run(const int* running) {
        uint64_t taken[EPCOMM_FABRIC_MAX_RINGS] = {};
        for (int r = 0; r < me_.fabric->num_rings; ++r) {
            taken[r] = me_.fabric->rings[r].consumer->tail;  // of earlier runs
        }
        while (__atomic_load_n(running, __ATOMIC_ACQUIRE) > 0 || !pending_.empty()) {
            for (int r = 0; r < me_.fabric->num_rings; ++r) {
                const epcomm_ring& ring = me_.fabric->rings[r];
                Command command;
                while (epcomm::fabric::take(ring, taken[r], &command)) {
                    pending_.push_back(command);
                    ++taken[r];
                }
                __atomic_store_n(&ring.consumer->tail, taken[r], __ATOMIC_RELEASE);
            }
            if (!pending_.empty() && random_() % 3 == 0) deliver_one();
            sched_yield();
        }
    }

 private:
    void deliver_one() {
        const size_t i = random_() % pending_.size();
        const Command command = pending_[i];
        pending_.erase(pending_.begin() + int64_t(i));
        if (me_.silent_after >= 0 && delivered_ >= me_.silent_after) return;
        ++delivered_;
        const emulated_rank& peer = ranks_[me_.rail[command.peer]];
        memcpy(peer.regions[command.remote.region] + command.remote.offset,
               me_.regions[command.local.region] + command.local.offset, command.bytes);
        if (command.op != EPCOMM_FABRIC_PUT_SIGNAL) return;
        auto* signals = reinterpret_cast<uint64_t*>(peer.regions[EPCOMM_FABRIC_SIGNALS]);
        __atomic_fetch_add(signals + command.signal, 1, __ATOMIC_RELEASE);
    }

    const emulated_rank* ranks_;
    const emulated_rank& me_;
    std::mt19937_64 random_;
    std::vector<Command> pending_;
    int delivered_ = 0;
};

}  // namespace

extern "C" {

/// Run every rank's stream to its end, all ranks at once.
void emulate(const emulated_rank* ranks, int32_t num_ranks, uint64_t seed) {
    int running = num_ranks;
    std::vector<std::thread> threads;
    for (int r = 0; r < num_ranks; ++r) {
        threads.emplace_back([=, &running] {
            for (int i = 0; i < ranks[r].num_launches; ++i) {
                const emulated_launch& launch = ranks[r].launches[i];
                std::this_thread::sleep_for(std::chrono::microseconds(launch.delay_us));
                run_launch(launch, (seed * 1000 + unsigned(r)) * 100 + unsigned(i));
            }
            __atomic_fetch_sub(&running, 1, __ATOMIC_ACQ_REL);
        });
        threads.emplace_back(
            [=, &running] { Proxy(ranks, r, seed * 7919 + unsigned(r)).run(&running); });
    }
    for (std::thread& thread : threads) thread.join();
}

}  // extern "C"
