// Compiled, not run, by launch/compile_cuda.sh: the writers' headers are device code. The NIC's are
// compiled with csrc/emulated/resident.cu.

#include "../../csrc/fabric/planes.h"

namespace {

using namespace epcomm;
using fabric::Ibgda;

struct Chunk {
    fabric::Lane lane;
    epcomm_fabric_place remote;
    epcomm_fabric_place local;
    uint64_t bytes;
    int32_t signal;
};

/// A block fills a chunk with bulk stores or plain ones; then one thread puts it.
template <class Fabric>
__global__ void put_chunk(const __grid_constant__ Ibgda ibgda, Chunk chunk, int* ok) {
    if (threadIdx.x == 0) mlx5::finish_bulk_stores();
    __syncthreads();
    if (threadIdx.x != 0) return;
    const Fabric fabric(ibgda);
    const fabric::Ticket ticket = fabric::put_signal(fabric, chunk.lane, chunk.remote, chunk.local,
                                                     chunk.bytes, chunk.signal);
    fabric::signal_add(fabric, chunk.lane, chunk.signal, 2);
    *ok = ticket != 0 && (fabric::done(fabric, chunk.lane.channel, ticket) ||
                          fabric::flush(fabric, chunk.lane.channel, ibgda.timeout_ns));
}

/// The lanes of a warp write a request each, with one reservation and one doorbell for all.
__global__ void put_rows(Ibgda fabric, fabric::Lane lane, uint32_t count, uint32_t bytes,
                         uint64_t* end) {
    mlx5::SendQueue* queue = queue_of(fabric, lane);
    const fabric::RegionKey from = fabric.local[1];
    const fabric::RegionKey to = fabric.remote[lane.peer * EPCOMM_FABRIC_MAX_REGIONS + 1];
    fabric::FabricWait wait(fabric, fabric.timeout_ns);
    const auto make = [&](uint32_t i, uint64_t position) {
        const uint64_t offset = uint64_t(i) * bytes;
        return mlx5::write_request(mlx5::header_of(*queue, position, i + 1 == count),
                                   {to.address + offset, to.key}, {from.address + offset, from.key},
                                   bytes);
    };
    const uint64_t posted =
        mlx5::post(mlx5::WarpLanes(), queue, count, mlx5::Ring::kNow, make, wait);
    if (threadIdx.x == 0) *end = posted;
}

}  // namespace

void launch_all(Ibgda fabric, Chunk chunk) {
    put_chunk<Ibgda><<<1, 128>>>(fabric, chunk, nullptr);
    put_chunk<fabric::Planes><<<1, 128>>>(fabric, chunk, nullptr);
    put_rows<<<1, 32>>>(fabric, chunk.lane, 8, 16, nullptr);
}
