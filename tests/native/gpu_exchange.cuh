// Two nodes exchange chunks and compare every byte, epoch after epoch. How a warp stores a chunk
// before it is put is the test's.
#pragma once

#include <algorithm>

#include "gpu_running.cuh"

namespace gpu {

/// What the writers of two nodes do to each other: a block for each channel, a chunk for each of
/// its warps. Both nodes' blocks must be resident together.
struct Exchange {
    Ibgda fabric[2];
    uint8_t* send[2];
    const uint8_t* receive[2];
    const uint64_t* signals[2];
    uint64_t* result;  ///< [kNumCounted]
    uint64_t max_bytes;
    int32_t epochs;
};

/// How much, by how many.
struct Load {
    int32_t warps;
    int32_t epochs;
    uint64_t max_bytes;         ///< of a chunk
    uint64_t shared_bytes = 0;  ///< of a block
};

constexpr int32_t kAcks = 256;  ///< signals from here on say that chunks were read

/// One that is stored, and is to arrive.
struct Content {
    int32_t node;
    uint64_t chunk;
    uint64_t bytes;  ///< a multiple of 16, short or long

    __device__ Content(int32_t from, uint64_t number, uint64_t max_bytes)
        : node(from), chunk(number) {
        const uint64_t draw = mix(chunk, 5);
        const uint64_t most = draw % 3 == 0 ? 512 : max_bytes;
        bytes = (draw / 3 % (most / 16) + 1) * 16;
    }
    __device__ uint64_t word(uint64_t i) const { return mix(mix(uint64_t(node), chunk), i); }
};

struct StorePlainly {
    __device__ void operator()(uint64_t* out, const Content& content) const {
        for (uint64_t w = threadIdx.x % 32; w < content.bytes / 8; w += 32) {
            out[w] = content.word(w);
        }
    }
};

/// `store(out, content)` by all lanes of a warp, which then meet.
template <class Store>
__device__ inline void exchange_chunks(const Exchange& x, const Store& store) {
    const int32_t channels = x.fabric[0].num_channels;
    const int32_t node = int32_t(blockIdx.x) / channels, channel = int32_t(blockIdx.x) % channels;
    const Ibgda& fabric = x.fabric[node];
    const uint32_t warps = blockDim.x / 32, warp = threadIdx.x / 32;
    const Lane there{1 - node, channel};
    const auto place_of = [&](uint32_t w) { return (uint64_t(channel) * warps + w) * x.max_bytes; };
    int goes_on = 1;
    for (int32_t epoch = 1; epoch <= x.epochs; ++epoch) {
        const Content mine(node, uint64_t(epoch) * 64 + warp, x.max_bytes);
        const uint64_t at = place_of(warp);
        store(reinterpret_cast<uint64_t*>(x.send[node] + at), mine);
        __syncwarp();
        if (threadIdx.x % 32 == 0) {
            const fabric::Ticket ticket = fabric::put_signal(fabric, there, {kReceive, 0, at},
                                                             {kSend, 0, at}, mine.bytes, channel);
            count(x.result, kFailedCalls, ticket == 0);
        }
        goes_on =
            __syncthreads_or(threadIdx.x == 0 && wait_for(fabric, there, &x.signals[node][channel],
                                                          uint64_t(epoch) * warps));
        if (goes_on == 0) break;
        uint64_t different = 0;
        for (uint32_t k = 0; k < warps; ++k) {
            const Content theirs(1 - node, uint64_t(epoch) * 64 + k, x.max_bytes);
            const auto* in = reinterpret_cast<const uint64_t*>(x.receive[node] + place_of(k));
            for (uint64_t w = threadIdx.x; w < theirs.bytes / 8; w += blockDim.x) {
                different += fabric::load_relaxed(&in[w]) != theirs.word(w);
            }
        }
        count(x.result, kDifferent, different);
        __syncthreads();
        // The chunks have been read; once the peer says so too, they may be overwritten.
        goes_on = __syncthreads_or(
            threadIdx.x == 0 && fabric::signal_add(fabric, there, kAcks + channel, 1) != 0 &&
            wait_for(fabric, there, &x.signals[node][kAcks + channel], uint64_t(epoch)));
        if (goes_on == 0) break;
    }
    if (threadIdx.x != 0) return;
    count(x.result, kFailedWaits, goes_on == 0);
    count(x.result, kFailedCalls,
          goes_on != 0 && !fabric::flush(fabric, channel, fabric.timeout_ns));
}

using ExchangeKernel = void (*)(Exchange);

inline Results exchange(RunningWorld& world, const Load& load, ExchangeKernel kernel) {
    Exchange x = {};
    for (int32_t n = 0; n < 2; ++n) {
        Node& node = world.nodes[size_t(n)];
        x.fabric[n] = node.fabric;
        x.send[n] = node.regions[kSend];
        x.receive[n] = node.regions[kReceive];
        x.signals[n] = world.words(n, kSignals);
    }
    x.result = world.result;
    x.max_bytes = load.max_bytes;
    x.epochs = load.epochs;
    kernel<<<uint32_t(2 * world.options.num_channels), uint32_t(load.warps * 32), load.shared_bytes,
             world.stream>>>(x);
    CUDA(cudaGetLastError());
    return world.results();
}

inline void expect_exchange(const Options& options, Load load, ExchangeKernel kernel) {
    load.epochs = std::max(3, int32_t(load.epochs / slowness()));
    RunningWorld world(options, kernel);
    expect_good(exchange(world, load, kernel));
    for (int32_t channel = 0; channel < options.num_channels; ++channel) {
        for (int n = 0; n < 2; ++n) {
            CHECK_EQUAL(world.signal(n, channel), uint64_t(load.warps) * uint64_t(load.epochs));
            CHECK_EQUAL(world.signal(n, kAcks + channel), uint64_t(load.epochs));
        }
    }
    world.expect_clean();
    for (const Traffic& traffic : world.nodes[0].server->look().traffic) {
        printf("%s\n", describe(0, options.line, traffic).c_str());
        CHECK(traffic.messages != 0);
    }
}

}  // namespace gpu
