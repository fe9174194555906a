// Finds libmlx5 and its functions.

#include "library.h"

#include <dlfcn.h>

#include "step.h"

namespace epcomm::fabric::devx {

namespace {

template <class Function>
void find(void* handle, const char* name, Function* function) {
    *reinterpret_cast<void**>(function) = dlsym(handle, name);
    if (*function == nullptr) {
        fail(Step::kLibrary, "libmlx5.so.1", std::string("it lacks ") + name);
    }
}

Library load() {
    void* handle = dlopen("libmlx5.so.1", RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
        const char* why = dlerror();
        fail(Step::kLibrary, "libmlx5.so.1", why != nullptr ? why : "cannot be opened");
    }
    Library found{};
#define EPCOMM_MLX5DV_FIND(result, name, parameters) find(handle, "mlx5dv_" #name, &found.name);
    EPCOMM_MLX5DV_FUNCTIONS(EPCOMM_MLX5DV_FIND)
#undef EPCOMM_MLX5DV_FIND
    *reinterpret_cast<void**>(&found.devx_umem_reg_ex) = dlsym(handle, "mlx5dv_devx_umem_reg_ex");
    return found;
}

}  // namespace

const Library& library() {
    static const Library loaded = load();
    return loaded;
}

}  // namespace epcomm::fabric::devx
