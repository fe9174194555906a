// Chunks that leave shared memory by bulk stores before a put, beside the GPU-resident engine.
//
// The engine's copy warps read them as an NIC would, from other SMs and without the async proxy. So
// a put that overtakes its bytes brings those of an earlier epoch, which the other node sees.

#include "../../csrc/kernels/bulk.cuh"
#include "gpu_exchange.cuh"

using namespace gpu;

namespace {

constexpr int32_t kWarps = 4;
constexpr uint64_t kMaxBytes = 8192;  ///< of a chunk: those of all warps fit without asking

/// All lanes of a warp make a chunk in shared memory; then each sends a part of it.
struct StoreInBulk {
    uint8_t* shared;  ///< [kWarps][kMaxBytes]

    __device__ void operator()([[maybe_unused]] uint64_t* out,
                               [[maybe_unused]] const Content& content) const {
#if EPCOMM_BULK
        const uint64_t lane = threadIdx.x % 32, units = content.bytes / 16;
        uint8_t* mine = shared + threadIdx.x / 32 * kMaxBytes;
        StorePlainly()(reinterpret_cast<uint64_t*>(mine), content);
        // What any lane stored to shared memory, before the copy engine reads it for another.
        proxy_fence();
        __syncwarp();
        const uint64_t begin = units * lane / 32 * 16, end = units * (lane + 1) / 32 * 16;
        if (begin != end) {
            bulk_store(reinterpret_cast<uint8_t*>(out) + begin, mine + begin,
                       uint32_t(end - begin));
        }
        // Of each lane its own, and then the barrier of those that put.
        mlx5::finish_bulk_stores();
#endif
    }
};

__global__ void exchange_in_bulk(const __grid_constant__ Exchange x) {
    extern __shared__ __align__(128) uint8_t memory[];
    exchange_chunks(x, StoreInBulk{memory});
}

void expect_bulk(Options options, int32_t epochs) {
    int major = 0;
    CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    if (major < 9) {
        printf("nothing to test: this GPU has no bulk copies\n");
        return;
    }
    options.region_bytes = 4 << 20;
    expect_exchange(options, {kWarps, epochs, kMaxBytes, kWarps * kMaxBytes}, exchange_in_bulk);
}

}  // namespace

// Nothing on the way gives late bytes time.
TEST(bulk_stores_before_a_put_without_a_line) {
    Options options;
    options.line = kNoLimit;
    expect_bulk(options, 2000);
}

TEST(bulk_stores_before_a_put_on_many_channels) {
    Options options;
    options.num_channels = 16;
    options.num_blocks = 4;
    options.line = kNoLimit;
    expect_bulk(options, 500);
}

TEST(bulk_stores_before_a_put_that_is_fetched_at_once) {
    Options options;
    options.server.rules = {everywhere(kEarlyFetch, 0, kAlways)};
    expect_bulk(options, 500);
}
