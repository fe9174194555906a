// The part of the CUDA runtime that rank and carrier of emulated NICs use, on the host: device
// memory is shared memory, a kernel a thread. See fake_device.cc.
#pragma once

#include <stddef.h>
#include <stdint.h>

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorNotReady = 600
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };
enum { cudaHostAllocDefault = 0, cudaStreamNonBlocking = 1, cudaHostRegisterMapped = 2 };

struct cudaIpcMemHandle_t {
    char reserved[64];
};
using cudaStream_t = struct FakeStream*;

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetPCIBusId(char* id, int bytes, int device);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaMalloc(void** start, size_t bytes);
cudaError_t cudaFree(void* start);
cudaError_t cudaMemset(void* start, int value, size_t bytes);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaHostAlloc(void** start, size_t bytes, unsigned flags);
cudaError_t cudaFreeHost(void* start);
cudaError_t cudaHostRegister(void* start, size_t bytes, unsigned flags);
cudaError_t cudaHostUnregister(void* start);
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned flags);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
