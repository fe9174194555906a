// libibverbs, opened at run time: importing epcomm never fails for want of a network card.
#pragma once

#include <stddef.h>

#include "abi.h"

namespace epcomm::fabric::ibv {

/// X(result, name, parameters) of what is called as ibv_<name>.
#define EPCOMM_IBV_FUNCTIONS(X)                                   \
    X(Device**, get_device_list, (int* count))                    \
    X(void, free_device_list, (Device**))                         \
    X(const char*, get_device_name, (Device*))                    \
    X(Context*, open_device, (Device*))                           \
    X(int, close_device, (Context*))                              \
    X(int, query_device, (Context*, DeviceAttr*))                 \
    X(int, query_port, (Context*, uint8_t port, PortAttr*))       \
    X(int, query_gid, (Context*, uint8_t port, int index, Gid*))  \
    X(Pd*, alloc_pd, (Context*))                                  \
    X(int, dealloc_pd, (Pd*))                                     \
    X(Mr*, reg_mr, (Pd*, void*, size_t bytes, int access))        \
    X(int, dereg_mr, (Mr*))                                       \
    X(Cq*, create_cq, (Context*, int entries, void*, void*, int)) \
    X(int, destroy_cq, (Cq*))                                     \
    X(Qp*, create_qp, (Pd*, QpInitAttr*))                         \
    X(int, destroy_qp, (Qp*))                                     \
    X(int, modify_qp, (Qp*, QpAttr*, int mask))                   \
    X(Ah*, create_ah, (Pd*, AddressAttr*))                        \
    X(int, destroy_ah, (Ah*))

struct Library {
#define EPCOMM_IBV_POINTER(result, name, parameters) result(*name) parameters;
    EPCOMM_IBV_FUNCTIONS(EPCOMM_IBV_POINTER)
#undef EPCOMM_IBV_POINTER
    /// Null before rdma-core 34.
    Mr* (*reg_dmabuf_mr)(Pd*, uint64_t offset, size_t bytes, uint64_t iova, int fd, int access);
};

/// The library, loaded at the first call and never unloaded: its drivers do not support that.
/// Throws std::runtime_error, with what to install, where there is none.
const Library& library();

}  // namespace epcomm::fabric::ibv
