// Opens the CUDA driver.

#include "cuda_driver.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace epcomm::fabric {

namespace {

CudaDriver load() {
    void* handle = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) throw std::runtime_error("there is no CUDA driver (libcuda.so.1)");
    CudaDriver driver{};
#define EPCOMM_CUDA_FIND(name, exported, parameters)                                \
    *reinterpret_cast<void**>(&driver.name) = dlsym(handle, exported);              \
    if (driver.name == nullptr) {                                                   \
        throw std::runtime_error("the CUDA driver is too old: it lacks " exported); \
    }
    EPCOMM_CUDA_FUNCTIONS(EPCOMM_CUDA_FIND)
#undef EPCOMM_CUDA_FIND
    check_cuda(driver.init(0), "cuInit");
    return driver;
}

}  // namespace

const CudaDriver& cuda_driver() {
    static const CudaDriver loaded = load();
    return loaded;
}

}  // namespace epcomm::fabric
