// Dispatch and combine inside a node as host code, rows dispatched by loads and stores instead of
// bulk copies. Built into a library that the tests drive from Python.
#include <chrono>

#include "../../csrc/kernels/combine.cuh"
#include "../../csrc/kernels/dispatch.cuh"
#include "cuda_emulation.h"

extern "C" {

int64_t epcomm_cuda_control_bytes(int32_t nodes, int32_t ranks, int32_t experts) {
    return epcomm::announced_offset({nodes, ranks, experts}) +
           ranks * int64_t(sizeof(epcomm_cuda_counter));
}

void epcomm_cuda_window_parts(const epcomm_cuda_row* row, int64_t rows, epcomm_cuda_parts* parts) {
    *parts = epcomm::window_parts(*row, rows);
}

/// A launch of a rank's stream.
typedef struct {
    int32_t blocks;
    int32_t warps;
    int32_t layout_warps;
    int32_t delay_us;  ///< before it
    const epcomm_cuda_dispatch* dispatch;
    const epcomm_cuda_combine* combine;  ///< if it is one
} node_launch;

}  // extern "C"

namespace {

struct Arguments {
    epcomm_cuda_dispatch call;
    epcomm::DispatchPlan plan;
};

template <bool f32, bool many>
void run_combine(const void* pointer) {
    const auto& call = *static_cast<const epcomm_cuda_combine*>(pointer);
    epcomm::combine_kernel<f32, many>(call, epcomm::plan_combine(call));
}

void (*kernel_of(const epcomm_cuda_combine& call))(const void*) {
    const bool many = call.routes.max_dests > epcomm::kPullCopies;
    if (call.announcement.format == EPCOMM_FORMAT_F32) {
        return many ? run_combine<true, true> : run_combine<true, false>;
    }
    return many ? run_combine<false, true> : run_combine<false, false>;
}

template <int packing>
void run_kernel(const void* pointer) {
    const auto& arguments = *static_cast<const Arguments*>(pointer);
    if (arguments.call.announce) {
        epcomm::dispatch_kernel<packing, false>(arguments.call, arguments.plan);
    } else {
        epcomm::dispatch_kernel<packing, true>(arguments.call, arguments.plan);
    }
}

void (*kernel_of(const epcomm_cuda_dispatch& call))(const void*) {
    if (call.announcement.format == call.input_format) return run_kernel<0>;
    return call.input_format == EPCOMM_FORMAT_BF16 ? run_kernel<1> : run_kernel<2>;
}

void run_launch(const node_launch& launch, uint64_t seed) {
    if (launch.combine != nullptr) {
        emulation::run_blocks(launch.blocks, launch.warps, seed, launch.combine,
                              kernel_of(*launch.combine));
        return;
    }
    const epcomm_cuda_dispatch& call = *launch.dispatch;
    Arguments arguments = {call, {}};
    const bool packs = call.announcement.format != call.input_format;
    arguments.plan.scale_bytes = packs ? call.row.scale_bytes : 0;
    arguments.plan.layout_warps = launch.layout_warps;
    emulation::run_blocks(launch.blocks, launch.warps, seed, &arguments, kernel_of(call));
}

}  // namespace

extern "C" {

/// Run every rank's `count` launches, all ranks at once.
void emulate_node(const node_launch* launches, int32_t num_ranks, int32_t count, uint64_t seed) {
    std::vector<std::thread> threads;
    for (int r = 0; r < num_ranks; ++r) {
        threads.emplace_back([=] {
            for (int i = 0; i < count; ++i) {
                const node_launch& launch = launches[r * count + i];
                std::this_thread::sleep_for(std::chrono::microseconds(launch.delay_us));
                run_launch(launch, (seed * 1000 + unsigned(r)) * 100 + unsigned(i));
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
}

/// The first expert that the kernels find on a wrong rank, where a rank has `each`; -1: none.
int32_t emulate_first_wrong_rank(int32_t each) {
    epcomm_cuda_world world = {};
    world.num_experts = each;
    world.num_ranks = 1;
    const epcomm::RankOfExpert rank_of(world);
    for (int expert = 0; expert < EPCOMM_CUDA_MAX_EXPERTS; ++expert) {
        if (rank_of(expert) != expert / each) return expert;
    }
    return -1;
}

}  // extern "C"
