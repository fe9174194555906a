// Calibration: how fast thread blocks move rows the way dispatch does: one load into shared memory,
// then one store per copy. No signals and no ranks; the host times launches with more and more
// blocks.
#include "bulk.cuh"
#include "launch.cuh"
#include "memory.cuh"

namespace epcomm {

constexpr int kCalibrateStages = 2;

/// Shared memory: stages of every warp | barriers.
inline int64_t calibrate_shared(const epcomm_cuda_calibrate& call) {
    return int64_t(call.num_warps) * kCalibrateStages * (call.row_bytes + sizeof(uint64_t));
}

__device__ __forceinline__ uint8_t* copy_of_row(const epcomm_cuda_calibrate& call, int64_t row,
                                                int copy) {
    return call.to + (row * call.copies + copy) % call.to_rows * call.row_bytes;
}

__device__ __forceinline__ const uint8_t* source_row(const epcomm_cuda_calibrate& call,
                                                     int64_t row) {
    return call.from + row % call.from_rows * call.row_bytes;
}

#if EPCOMM_BULK

/// One thread: as store_rows of dispatch does it, the next row loads while the stores drain.
__device__ inline void move_rows(const epcomm_cuda_calibrate& call, uint8_t* stages,
                                 uint64_t* loaded, int64_t row, int64_t step) {
    for (int i = 0; i < kCalibrateStages; ++i) barrier_init(loaded + i);
    barrier_init_fence();
    if (row < call.num_rows) {
        bulk_load(stages, source_row(call, row), uint32_t(call.row_bytes), loaded);
    }
    int slot = 0;
    uint32_t parity = 0;
    for (; row < call.num_rows; row += step) {
        barrier_wait(loaded + slot, parity);
        for (int c = 0; c < call.copies; ++c) {
            bulk_store(copy_of_row(call, row, c), stages + slot * call.row_bytes,
                       uint32_t(call.row_bytes));
        }
        bulk_commit();
        bulk_wait_read<kCalibrateStages - 1>();
        slot = slot + 1 == kCalibrateStages ? 0 : slot + 1;
        parity ^= uint32_t(slot == 0);
        if (row + step < call.num_rows) {
            bulk_load(stages + slot * call.row_bytes, source_row(call, row + step),
                      uint32_t(call.row_bytes), loaded + slot);
        }
    }
    bulk_wait_written();
}

#else

__device__ inline void move_rows_plain(const epcomm_cuda_calibrate& call, int64_t row,
                                       int64_t step) {
    for (; row < call.num_rows; row += step) {
        for (int at = lane_id() * 16; at < call.row_bytes; at += 32 * 16) {
            const uint4 v = load_once(source_row(call, row) + at);
            for (int c = 0; c < call.copies; ++c) store_once(copy_of_row(call, row, c) + at, v);
        }
    }
}

#endif

__global__ void __launch_bounds__(512, 1)
    calibrate_kernel(const __grid_constant__ epcomm_cuda_calibrate call) {
    const int warps = int(blockDim.x >> 5);
    const int64_t first = int64_t(blockIdx.x) * warps + warp_id();
    const int64_t step = int64_t(gridDim.x) * warps;
#if EPCOMM_BULK
    extern __shared__ __align__(128) uint8_t shared[];
    const int64_t stages = int64_t(kCalibrateStages) * call.row_bytes;
    auto* barriers = reinterpret_cast<uint64_t*>(shared + warps * stages);
    if (lane_id() == 0) {
        move_rows(call, shared + warp_id() * stages, barriers + warp_id() * kCalibrateStages, first,
                  step);
    }
#else
    move_rows_plain(call, first, step);
#endif
}

int launch_calibrate(const epcomm_cuda_calibrate& call, cudaStream_t stream) {
    if (call.num_blocks < 1 || call.num_warps < 1 || call.num_warps > 16 || call.copies < 1 ||
        call.row_bytes < 16 || call.row_bytes % 16 != 0 || call.from_rows < 1 || call.to_rows < 1 ||
        calibrate_shared(call) > shared_limit()) {
        return cudaErrorInvalidValue;
    }
    calibrate_kernel<<<call.num_blocks, 32 * call.num_warps, size_t(calibrate_shared(call)),
                       stream>>>(call);
    return cudaGetLastError();
}

int load_calibrate() { return load(calibrate_kernel); }

}  // namespace epcomm
