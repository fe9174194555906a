// The engine's kernel on a GPU.

#include "resident.cuh"

namespace epcomm::emulated {

namespace {

/// Nanoseconds of the device's timer, and between its ticks, where it is coarse, of the cycles.
class Clock {
 public:
    __device__ explicit Clock(int64_t epoch_ns) : epoch_ns_(epoch_ns) {
        // The shortest step in a while, and the cycles of the steps seen.
        int64_t last = fabric::now_ns(), first_tick = 0;
        long long first_cycle = 0;
        uint32_t shortest = ~0u;
        uint32_t ticks = 0;
        const long long start = clock64();
        while (clock64() - start < kCalibrationCycles && ticks < kCalibrationTicks) {
            const int64_t seen = fabric::now_ns();
            if (seen == last) continue;
            const int64_t step = seen - last;
            last = seen;
            if (ticks++ == 0) {
                first_tick = seen;
                first_cycle = clock64();
                continue;
            }
            if (step < int64_t(shortest)) shortest = uint32_t(step);
            const long long cycles = clock64() - first_cycle;
            picoseconds_per_cycle_ = uint32_t((last - first_tick) * 1000 / cycles);
        }
        granularity_ns_ = shortest;
        tick_ = last;
        cycle_ = clock64();
    }

    __device__ Picoseconds now() {
        const int64_t tick = fabric::now_ns();
        const Picoseconds time = Picoseconds(tick - epoch_ns_) * kNanosecond;
        if (granularity_ns_ <= kFine) return time;
        const long long cycle = clock64();
        if (tick != tick_) {
            tick_ = tick;
            cycle_ = cycle;
        }
        // A tick is seen late, so this is never ahead; and never past the next tick.
        const Picoseconds since = Picoseconds(cycle - cycle_) * picoseconds_per_cycle_;
        const Picoseconds most = Picoseconds(granularity_ns_) * kNanosecond - 1;
        return time + (since < most ? since : most);
    }

    __device__ uint32_t granularity_ns() const { return granularity_ns_; }

 private:
    static constexpr uint32_t kFine = 64;
    static constexpr uint32_t kCalibrationTicks = 32;
    static constexpr long long kCalibrationCycles = 400'000;

    int64_t epoch_ns_;
    int64_t tick_;
    long long cycle_;
    uint32_t granularity_ns_;
    uint32_t picoseconds_per_cycle_ = 500;
};

/// See resident.cuh.
struct Gpu : Clock {
    static constexpr uint32_t kControlWarps = 4, kCopyWarps = 11;
    // A block copies a slice in 0.3 us or so, and claims some more of a message in 0.7 us.
    static constexpr uint32_t kKept = 8, kStock = 4, kClaim = 4;
    static constexpr uint64_t kSweepsPerLook = 64;
    static constexpr bool kReportsWakes = false;

    __device__ explicit Gpu(const Resident& resident) : Clock(resident.wire.epoch_ns) {}
    __device__ static void swept(uint32_t, bool, Picoseconds) {}
    __device__ static void looked_at_bell() {}
};

constexpr int kThreads = kWarps<Gpu> * 32;

__global__ void __launch_bounds__(kThreads, 1)
    resident_kernel(const __grid_constant__ Resident resident) {
    extern __shared__ __align__(128) uint8_t memory[];
    serve_block<Gpu>(resident, memory);
}

}  // namespace

int load_resident(uint64_t shared_bytes) {
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, resident_kernel);
    if (error != cudaSuccess) return error;
    return cudaFuncSetAttribute(resident_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                int(shared_bytes));
}

uint64_t resident_shared_bytes(const Resident& resident) {
    return shared_bytes(resident, Gpu::kControlWarps);
}

uint64_t resident_offer_bytes(const Resident& resident) {
    return sizeof(Offer) * resident.num_blocks * Gpu::kControlWarps * kOffers;
}

uint64_t resident_traffic_cells(const Resident& resident) {
    return uint64_t(resident.num_blocks) * Gpu::kControlWarps * resident.num_planes * 32;
}

namespace {

__global__ void show_timer_kernel(uint64_t* place, int64_t duration_ns) {
    int64_t now = fabric::now_ns();
    for (const int64_t until = now + duration_ns; now < until; now = fabric::now_ns()) {
        fabric::store_release(place, uint64_t(now));
    }
}

}  // namespace

int show_timer(uint64_t* place, int64_t duration_ns, void* stream) {
    show_timer_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(place, duration_ns);
    return cudaGetLastError();
}

int launch_resident(const Resident& resident, void* stream) {
    resident_kernel<<<resident.num_blocks, kThreads, resident_shared_bytes(resident),
                      static_cast<cudaStream_t>(stream)>>>(resident);
    return cudaGetLastError();
}

}  // namespace epcomm::emulated
