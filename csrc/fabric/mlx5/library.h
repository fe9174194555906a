// libmlx5, opened at run time.
#pragma once

#include "../verbs/abi.h"
#include "abi.h"

namespace epcomm::fabric::devx {

/// X(result, name, parameters) of what is called as mlx5dv_<name>.
#define EPCOMM_MLX5DV_FUNCTIONS(X)                                                              \
    X(bool, is_supported, (ibv::Device*))                                                       \
    X(ibv::Context*, open_device, (ibv::Device*, ContextAttr*))                                 \
    X(int, init_obj, (Handles*, uint64_t type))                                                 \
    X(int, devx_general_cmd,                                                                    \
      (ibv::Context*, const void* in, size_t in_bytes, void* out, size_t out_bytes))            \
    X(Object*, devx_obj_create,                                                                 \
      (ibv::Context*, const void* in, size_t in_bytes, void* out, size_t out_bytes))            \
    X(int, devx_obj_modify,                                                                     \
      (Object*, const void* in, size_t in_bytes, void* out, size_t out_bytes))                  \
    X(int, devx_obj_query, (Object*, const void* in, size_t in_bytes, void* out, size_t bytes)) \
    X(int, devx_obj_destroy, (Object*))                                                         \
    X(Umem*, devx_umem_reg, (ibv::Context*, void*, size_t bytes, uint32_t access))              \
    X(int, devx_umem_dereg, (Umem*))                                                            \
    X(Uar*, devx_alloc_uar, (ibv::Context*, uint32_t type))                                     \
    X(void, devx_free_uar, (Uar*))                                                              \
    X(int, devx_query_eqn, (ibv::Context*, uint32_t vector, uint32_t* number))                  \
    X(EventChannel*, devx_create_event_channel, (ibv::Context*, int flags))                     \
    X(void, devx_destroy_event_channel, (EventChannel*))                                        \
    X(int, devx_subscribe_devx_event,                                                           \
      (EventChannel*, Object*, uint16_t types_bytes, uint16_t* types, uint64_t cookie))         \
    X(ssize_t, devx_get_event, (EventChannel*, Event*, size_t bytes))

/// Every call of this folder to the card goes through these pointers, those of ibv::library() and,
/// for a GPU's memory, those of cuda_driver(). Tests put tables of their own in their places.
struct Library {
#define EPCOMM_MLX5DV_POINTER(result, name, parameters) result(*name) parameters;
    EPCOMM_MLX5DV_FUNCTIONS(EPCOMM_MLX5DV_POINTER)
#undef EPCOMM_MLX5DV_POINTER
    /// Null in old versions: then no queue can lie in a dma-buf.
    Umem* (*devx_umem_reg_ex)(ibv::Context*, UmemIn*);
};

/// Loaded at the first call and never unloaded.
/// Throws std::runtime_error, with what to install, where there is none.
const Library& library();

}  // namespace epcomm::fabric::devx
