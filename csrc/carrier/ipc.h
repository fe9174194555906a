// Device memory that another process opens: CUDA IPC, which names whole allocations.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <string>
#include <vector>

namespace epcomm::carrier {

/// A piece of device memory; plain data.
struct IpcMemory {
    uint64_t offset;  ///< in the allocation that the handle names
    uint64_t bytes;   ///< 0: there is none
    cudaIpcMemHandle_t handle;
};

/// Throws std::runtime_error with `what` and the error in words, unless there is none.
void require(cudaError_t error, const std::string& what);

/// Of this process's memory, which must come from cudaMalloc. Throws std::runtime_error.
IpcMemory export_memory(const void* pointer, uint64_t bytes);

/// Memory of other processes; closed with the object.
class IpcMappings {
 public:
    IpcMappings() = default;
    IpcMappings(const IpcMappings&) = delete;
    IpcMappings& operator=(const IpcMappings&) = delete;
    ~IpcMappings();

    /// Where the memory is in this process; null where there is none. Throws std::runtime_error.
    uint8_t* open(const IpcMemory& memory);

 private:
    struct Opened {
        cudaIpcMemHandle_t handle;
        void* base;
    };
    std::vector<Opened> opened_;
};

}  // namespace epcomm::carrier
