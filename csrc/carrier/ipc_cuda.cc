#include <dlfcn.h>
#include <string.h>

#include <stdexcept>

#include "ipc.h"

namespace epcomm::carrier {

namespace {

/// Start of the allocation a device pointer lies in. The runtime has no such query, so the driver,
/// which is loaded anyway, is asked.
uint64_t allocation_start(const void* pointer) {
    using Query = int (*)(unsigned long long*, size_t*, unsigned long long);
    void* driver = dlopen("libcuda.so.1", RTLD_NOW);
    const auto query = driver == nullptr
                           ? nullptr
                           : reinterpret_cast<Query>(dlsym(driver, "cuMemGetAddressRange_v2"));
    unsigned long long start = 0;
    size_t bytes = 0;
    if (query == nullptr || query(&start, &bytes, reinterpret_cast<uintptr_t>(pointer)) != 0) {
        throw std::runtime_error("memory to share is not device memory");
    }
    return start;
}

}  // namespace

void require(cudaError_t error, const std::string& what) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

IpcMemory export_memory(const void* pointer, uint64_t bytes) {
    IpcMemory memory{};
    const uint64_t start = allocation_start(pointer);
    require(cudaIpcGetMemHandle(&memory.handle, reinterpret_cast<void*>(start)),
            "cudaIpcGetMemHandle; memory must come from cudaMalloc");
    memory.offset = reinterpret_cast<uintptr_t>(pointer) - start;
    memory.bytes = bytes;
    return memory;
}

IpcMappings::~IpcMappings() {
    for (const Opened& opened : opened_) cudaIpcCloseMemHandle(opened.base);
}

uint8_t* IpcMappings::open(const IpcMemory& memory) {
    if (memory.bytes == 0) return nullptr;
    // Pieces may lie in one allocation, which can be opened once only.
    for (const Opened& opened : opened_) {
        if (memcmp(&opened.handle, &memory.handle, sizeof memory.handle) == 0) {
            return static_cast<uint8_t*>(opened.base) + memory.offset;
        }
    }
    void* base = nullptr;
    require(cudaIpcOpenMemHandle(&base, memory.handle, cudaIpcMemLazyEnablePeerAccess),
            "cudaIpcOpenMemHandle; all ranks must be on one machine");
    opened_.push_back({memory.handle, base});
    return static_cast<uint8_t*>(base) + memory.offset;
}

}  // namespace epcomm::carrier
