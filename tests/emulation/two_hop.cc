// The kernels of the two-hop path as host code, over emulated proxies or emulated NICs. Built into
// a library that the tests drive from Python.
#include <algorithm>

#include "../../csrc/kernels/two_hop_combine.cuh"
#include "../../csrc/kernels/two_hop_dispatch.cuh"
#include "../../csrc/kernels/two_hop_layout.cuh"
#include "cuda_emulation.h"
#include "emulated_nics.h"
#include "emulated_proxy.h"

extern "C" {

void epcomm_fabric_wake(const epcomm_fabric*, int32_t) {}

int64_t epcomm_cuda_control_bytes(int32_t nodes, int32_t ranks, int32_t experts) {
    return epcomm::announced_offset({nodes, ranks, experts}) +
           ranks * int64_t(sizeof(epcomm_cuda_counter));
}

void epcomm_cuda_window_parts(const epcomm_cuda_row* row, int64_t rows, epcomm_cuda_parts* parts) {
    *parts = epcomm::window_parts(*row, rows);
}

}  // extern "C"

namespace {

template <typename Call, void (*kernel)(const Call)>
void run_kernel(const void* call) {
    // Shared memory may hold anything where a block begins.
    if (epcomm::lane_id() == 0) memset(&epcomm::open_spans(), 0xa5, sizeof(epcomm::OpenSpans));
    kernel(*static_cast<const Call*>(call));
}

template <class Kind>
void (*kernel_of(const emulated_launch& launch))(const void*) {
    if (launch.kind == 0) {
        return run_kernel<epcomm_cuda_two_hop_layout, epcomm::two_hop_layout_kernel<Kind>>;
    }
    if (launch.kind == 1) {
        const auto* call = static_cast<const epcomm_cuda_two_hop_dispatch*>(launch.call);
        const int input = call->call.input_format;
        using Call = epcomm_cuda_two_hop_dispatch;
        if (call->call.announcement.format == input) {
            return run_kernel<Call, epcomm::two_hop_dispatch_kernel<Kind, 0>>;
        }
        return input == EPCOMM_FORMAT_BF16
                   ? run_kernel<Call, epcomm::two_hop_dispatch_kernel<Kind, 1>>
                   : run_kernel<Call, epcomm::two_hop_dispatch_kernel<Kind, 2>>;
    }
    using Call = epcomm_cuda_two_hop_combine;
    const auto* call = static_cast<const Call*>(launch.call);
    const bool f32 = call->call.announcement.format == EPCOMM_FORMAT_F32;
    return epcomm::with_formats<Kind::kFewKernels>(
        f32, call->call.announcement.wire, call->call.world.num_topk, [](auto formats) {
            return run_kernel<Call, epcomm::two_hop_combine_kernel<Kind, decltype(formats)>>;
        });
}

const epcomm_cuda_rail& rail_of(const emulated_launch& launch) {
    if (launch.kind == 0) return static_cast<const epcomm_cuda_two_hop_layout*>(launch.call)->rail;
    if (launch.kind == 2) return static_cast<const epcomm_cuda_two_hop_combine*>(launch.call)->rail;
    return static_cast<const epcomm_cuda_two_hop_dispatch*>(launch.call)->rail;
}

void run_launch(const emulated_launch& launch, uint64_t seed) {
    const auto run = epcomm::with_staging_kind(
        rail_of(launch), [&](auto kind) { return kernel_of<decltype(kind)>(launch); });
    emulation::run_blocks(launch.blocks, launch.warps, seed, launch.call, run);
}

}  // namespace

extern "C" {

/// Run every rank's stream to its end, all ranks at once. `nics`: of the world, or null.
void emulate(const emulated_stream* streams, const emulated_member* members, int32_t num_ranks,
             Nics* nics, uint64_t seed) {
    int running = num_ranks;
    std::vector<std::thread> threads;
    if (nics != nullptr) nics->start();
    for (int r = 0; r < num_ranks; ++r) {
        threads.emplace_back([=, &running] {
            for (int i = 0; i < streams[r].num_launches; ++i) {
                const emulated_launch& launch = streams[r].launches[i];
                std::this_thread::sleep_for(std::chrono::microseconds(launch.delay_us));
                run_launch(launch, (seed * 1000 + unsigned(r)) * 100 + unsigned(i));
            }
            __atomic_fetch_sub(&running, 1, __ATOMIC_ACQ_REL);
        });
        if (members[r].proxied == nullptr) continue;
        threads.emplace_back(
            [=, &running] { Proxy(members, r, seed * 7919 + unsigned(r)).run(&running); });
    }
    for (std::thread& thread : threads) thread.join();
    if (nics != nullptr) nics->stop();
}

}  // extern "C"
