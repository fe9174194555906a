// A device for rank and carrier of emulated NICs, on the host: memory that processes share, and the
// engine's kernel (resident.cuh) as a thread of coroutines, with the machine's clock.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <map>
#include <mutex>
#include <thread>

#include "../../emulation/cuda_emulation.h"

// Behind it: csrc uses what it defines.
#include "../../../csrc/carrier/ipc.h"
#include "../../../csrc/emulated/resident.cuh"
#include "../../../csrc/fabric/peer_memory.h"

using namespace epcomm;

// Memory ------------------------------------------------------------------------------------

namespace {

struct Allocation {
    int fd;
    size_t bytes;
};

std::mutex lock;
std::map<uint8_t*, Allocation> allocations;
std::map<void*, size_t> registered;
/// Their timers are far apart.
constexpr int kDevices = 3;
constexpr int64_t kBetweenTimersNs = 100'000'000'000;
thread_local int current_device = 0;

}  // namespace

const char* cudaGetErrorString(cudaError_t) { return "the fake device says no"; }
cudaError_t cudaSetDevice(int device) {
    current_device = device;
    return device >= 0 && device < kDevices ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char* id, int bytes, int device) {
    snprintf(id, size_t(bytes), "0000:0%d:00.0", device);
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaMalloc(void** start, size_t bytes) {
    const int fd = memfd_create("fake-device", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, off_t(bytes)) != 0) return cudaErrorMemoryAllocation;
    *start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (*start == MAP_FAILED) return cudaErrorMemoryAllocation;
    const std::lock_guard<std::mutex> guard(lock);
    allocations[static_cast<uint8_t*>(*start)] = {fd, bytes};
    return cudaSuccess;
}

cudaError_t cudaFree(void* start) {
    const std::lock_guard<std::mutex> guard(lock);
    const auto found = allocations.find(static_cast<uint8_t*>(start));
    if (found == allocations.end()) return cudaSuccess;
    munmap(start, found->second.bytes);
    close(found->second.fd);
    allocations.erase(found);
    return cudaSuccess;
}

cudaError_t cudaMemset(void* start, int value, size_t bytes) {
    memset(start, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    memcpy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
    memcpy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** start, size_t bytes, unsigned) {
    *start = calloc(1, bytes);
    return *start == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFreeHost(void* start) {
    free(start);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void* start, size_t bytes, unsigned) {
    const std::lock_guard<std::mutex> guard(lock);
    return registered.emplace(start, bytes).second ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaHostUnregister(void* start) {
    const std::lock_guard<std::mutex> guard(lock);
    return registered.erase(start) == 1 ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
    const std::lock_guard<std::mutex> guard(lock);
    *device = host;
    return registered.count(host) == 1 ? cudaSuccess : cudaErrorMemoryAllocation;
}

// Between processes -------------------------------------------------------------------------

namespace epcomm::carrier {

void require(cudaError_t error, const std::string& what) {
    if (error != cudaSuccess) throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

IpcMemory export_memory(const void* pointer, uint64_t bytes) {
    const std::lock_guard<std::mutex> guard(lock);
    const auto* at = static_cast<const uint8_t*>(pointer);
    for (const auto& [start, allocation] : allocations) {
        if (at < start || at + bytes > start + allocation.bytes) continue;
        IpcMemory memory{};
        memory.offset = uint64_t(at - start);
        memory.bytes = bytes;
        const auto file = fabric::memory_file(allocation.fd, 0, allocation.bytes);
        static_assert(sizeof file <= sizeof memory.handle, "a file for a handle");
        memcpy(&memory.handle, &file, sizeof file);
        return memory;
    }
    throw std::runtime_error("memory to share is not device memory");
}

IpcMappings::~IpcMappings() {
    for (const Opened& opened : opened_) {
        fabric::MemoryFile file;
        memcpy(static_cast<void*>(&file), &opened.handle, sizeof file);
        munmap(opened.base, file.bytes);
    }
}

uint8_t* IpcMappings::open(const IpcMemory& memory) {
    if (memory.bytes == 0) return nullptr;
    for (const Opened& opened : opened_) {
        if (memcmp(&opened.handle, &memory.handle, sizeof memory.handle) == 0) {
            return static_cast<uint8_t*>(opened.base) + memory.offset;
        }
    }
    fabric::MemoryFile file;
    memcpy(static_cast<void*>(&file), &memory.handle, sizeof file);
    const std::string path = "/proc/" + std::to_string(file.pid) + "/fd/" + std::to_string(file.fd);
    const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    void* base = mmap(nullptr, file.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (fd >= 0) close(fd);
    if (base == MAP_FAILED) throw std::runtime_error("cannot map " + path);
    opened_.push_back({memory.handle, base});
    return static_cast<uint8_t*>(base) + memory.offset;
}

}  // namespace epcomm::carrier

// The kernel --------------------------------------------------------------------------------

struct FakeStream {
    std::thread kernel;
    std::atomic<bool> runs{false};
};

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    *stream = new FakeStream();
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    if (stream->kernel.joinable()) stream->kernel.join();
    delete stream;
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    return stream->runs ? cudaErrorNotReady : cudaSuccess;
}

namespace epcomm::emulated {

namespace {

int64_t device_now_ns() { return fabric::now_ns() + current_device * kBetweenTimersNs; }

/// What the kernel runs on; see resident.cuh.
struct HostMachine {
    static constexpr uint32_t kControlWarps = 2, kCopyWarps = 2;
    static constexpr uint32_t kKept = 8, kStock = 4, kClaim = 4;
    static constexpr uint64_t kSweepsPerLook = 1;
    static constexpr bool kReportsWakes = false;

    explicit HostMachine(const Resident& resident) : epoch_ns(resident.wire.epoch_ns) {}
    Picoseconds now() const { return Picoseconds(device_now_ns() - epoch_ns) * kNanosecond; }
    static uint32_t granularity_ns() { return 1; }
    static void swept(uint32_t, bool, Picoseconds) {}
    static void looked_at_bell() {}

    int64_t epoch_ns;
};

thread_local uint8_t* shared_memory = nullptr;

void run_block(const void* resident) {
    serve_block<HostMachine>(*static_cast<const Resident*>(resident), shared_memory);
}

void run_kernel(const Resident& resident) {
    struct Free {
        void operator()(void* memory) const { free(memory); }
    };
    std::vector<emulation::Block> blocks(resident.num_blocks);
    std::vector<std::unique_ptr<uint8_t, Free>> memory;
    for (uint32_t b = 0; b < resident.num_blocks; ++b) {
        const uint64_t bytes = (resident_shared_bytes(resident) + 127) / 128 * 128;
        memory.emplace_back(static_cast<uint8_t*>(aligned_alloc(128, bytes)));
        blocks[b].block.x = b;
        blocks[b].block_dim.x = 32 * kWarps<HostMachine>;
        blocks[b].grid_dim.x = resident.num_blocks;
        blocks[b].kernel = &resident;
        blocks[b].run = run_block;
        emulation::open_block(blocks[b]);
    }
    for (bool any = true; any;) {
        any = false;
        for (uint32_t b = 0; b < resident.num_blocks; ++b) {
            if (blocks[b].left == 0) continue;
            any = true;
            shared_memory = memory[b].get();
            emulation::run_once(blocks[b]);
        }
        sched_yield();
    }
}

}  // namespace

int load_resident(uint64_t shared_bytes) {
    return shared_bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}

uint64_t resident_shared_bytes(const Resident& resident) {
    return shared_bytes(resident, HostMachine::kControlWarps);
}

uint64_t resident_traffic_cells(const Resident& resident) {
    return uint64_t(resident.num_blocks) * HostMachine::kControlWarps * resident.num_planes * 32;
}

uint64_t resident_offer_bytes(const Resident& resident) {
    return uint64_t(resident.num_blocks) * HostMachine::kControlWarps * kOffers * sizeof(Offer);
}

int show_timer(uint64_t* place, int64_t, void*) {
    *place = uint64_t(device_now_ns());
    return cudaSuccess;
}

int launch_resident(const Resident& resident, void* stream) {
    auto* on = static_cast<FakeStream*>(stream);
    on->runs = true;
    on->kernel = std::thread([resident, on, device = current_device] {
        current_device = device;
        run_kernel(resident);
        on->runs = false;
    });
    return cudaSuccess;
}

}  // namespace epcomm::emulated
