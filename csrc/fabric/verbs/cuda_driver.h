// The few calls of the CUDA driver that transports over network cards make, opened at run time.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <string>

namespace epcomm::fabric {

/// X(name, exported name, parameters); every call returns 0 or a CUresult.
#define EPCOMM_CUDA_FUNCTIONS(X)                                                              \
    X(init, "cuInit", (unsigned))                                                             \
    X(device_get, "cuDeviceGet", (int*, int ordinal))                                         \
    X(device_get_pci, "cuDeviceGetPCIBusId", (char*, int bytes, int device))                  \
    X(retain, "cuDevicePrimaryCtxRetain", (void** context, int device))                       \
    X(release, "cuDevicePrimaryCtxRelease_v2", (int device))                                  \
    X(push, "cuCtxPushCurrent_v2", (void* context))                                           \
    X(pop, "cuCtxPopCurrent_v2", (void** context))                                            \
    X(export_range, "cuMemGetHandleForAddressRange",                                          \
      (void* handle, uint64_t pointer, size_t bytes, int type, unsigned long long flags))     \
    X(alloc, "cuMemAlloc_v2", (uint64_t* pointer, size_t bytes))                              \
    X(free, "cuMemFree_v2", (uint64_t pointer))                                               \
    X(set_attribute, "cuPointerSetAttribute",                                                 \
      (const void* value, int attribute, uint64_t pointer))                                   \
    X(host_alloc, "cuMemHostAlloc", (void**, size_t bytes, unsigned flags))                   \
    X(host_free, "cuMemFreeHost", (void*))                                                    \
    X(host_register, "cuMemHostRegister_v2", (void*, size_t bytes, unsigned flags))           \
    X(host_unregister, "cuMemHostUnregister", (void*))                                        \
    X(host_pointer, "cuMemHostGetDevicePointer_v2",                                           \
      (uint64_t* pointer, void* host, unsigned flags))                                        \
    X(stream_create, "cuStreamCreate", (void** stream, unsigned flags))                       \
    X(stream_destroy, "cuStreamDestroy_v2", (void* stream))                                   \
    X(stream_wait, "cuStreamSynchronize", (void* stream))                                     \
    X(to_host, "cuMemcpyDtoHAsync_v2", (void* to, uint64_t from, size_t bytes, void* stream)) \
    X(to_device, "cuMemcpyHtoDAsync_v2", (uint64_t to, const void* from, size_t bytes, void*))

struct CudaDriver {
#define EPCOMM_CUDA_POINTER(name, exported, parameters) int(*name) parameters;
    EPCOMM_CUDA_FUNCTIONS(EPCOMM_CUDA_POINTER)
#undef EPCOMM_CUDA_POINTER
};

/// Throws std::runtime_error where there is no driver, or it lacks one of the calls.
const CudaDriver& cuda_driver();

/// The primary context of a device, current in this thread while the object lives.
class CudaContext {
 public:
    explicit CudaContext(int32_t ordinal);
    ~CudaContext();
    CudaContext(const CudaContext&) = delete;
    CudaContext& operator=(const CudaContext&) = delete;

 private:
    int device_ = 0;
};

/// Throws std::runtime_error naming the call if `result` is not 0.
void check_cuda(int result, const char* call);

/// A device's PCI address as the kernel writes it, such as 0000:1b:00.0.
std::string gpu_address(int32_t ordinal);

}  // namespace epcomm::fabric
