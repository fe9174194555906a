// What is outside: libibverbs and its functions, and the kernel's tree of devices.

#include "library.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "device.h"

namespace epcomm::fabric::ibv {

namespace {

template <class Function>
void find(void* handle, const char* name, Function* function) {
    *reinterpret_cast<void**>(function) = dlsym(handle, name);
    if (*function == nullptr) {
        throw std::runtime_error(std::string("libibverbs.so.1 lacks ") + name +
                                 ": it is older than rdma-core 15");
    }
}

Library load() {
    void* handle = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
        const char* why = dlerror();
        throw std::runtime_error(std::string("libibverbs cannot be opened (") +
                                 (why != nullptr ? why : "no reason given") +
                                 "); install rdma-core (libibverbs1 and ibverbs-providers)");
    }
    Library found{};
#define EPCOMM_IBV_FIND(result, name, parameters) find(handle, "ibv_" #name, &found.name);
    EPCOMM_IBV_FUNCTIONS(EPCOMM_IBV_FIND)
#undef EPCOMM_IBV_FIND
    *reinterpret_cast<void**>(&found.reg_dmabuf_mr) = dlsym(handle, "ibv_reg_dmabuf_mr");
    return found;
}

}  // namespace

const Library& library() {
    static const Library loaded = load();
    return loaded;
}

}  // namespace epcomm::fabric::ibv

namespace epcomm::fabric {

const Sysfs& sysfs() {
    static const Sysfs machine;
    return machine;
}

}  // namespace epcomm::fabric
