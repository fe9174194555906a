// What is made of the driver's calls.

#include <ctype.h>

#include <stdexcept>

#include "cuda_driver.h"

namespace epcomm::fabric {

CudaContext::CudaContext(int32_t ordinal) {
    const CudaDriver& cuda = cuda_driver();
    void* context = nullptr;
    check_cuda(cuda.device_get(&device_, ordinal), "cuDeviceGet");
    check_cuda(cuda.retain(&context, device_), "cuDevicePrimaryCtxRetain");
    if (const int result = cuda.push(context); result != 0) {
        cuda.release(device_);
        check_cuda(result, "cuCtxPushCurrent");
    }
}

CudaContext::~CudaContext() {
    void* context = nullptr;
    cuda_driver().pop(&context);
    cuda_driver().release(device_);
}

void check_cuda(int result, const char* call) {
    if (result != 0) {
        throw std::runtime_error(std::string(call) + " failed (CUresult " + std::to_string(result) +
                                 ")");
    }
}

std::string gpu_address(int32_t ordinal) {
    int device = 0;
    char address[32] = {};
    check_cuda(cuda_driver().device_get(&device, ordinal), "cuDeviceGet");
    check_cuda(cuda_driver().device_get_pci(address, sizeof address, device),
               "cuDeviceGetPCIBusId");
    for (char* c = address; *c != 0; ++c) *c = char(tolower(*c));
    return address;
}

}  // namespace epcomm::fabric
