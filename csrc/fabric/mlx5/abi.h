// The part of libmlx5's binary interface (mlx5dv) that the transport uses, so that the library is
// built without its headers and opened at run time. Names are those of <infiniband/mlx5dv.h>
// without the prefix. tests/native/mlx5_parity.cc compares them with the system's header where it
// is installed.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "../../mlx5/bytes.h"

namespace epcomm::fabric::devx {

/// An object of the card that was made by a command.
struct Object;

enum ContextFlag : uint32_t { kContextDevx = 1 << 0 };
struct ContextAttr {
    uint32_t flags;
    uint64_t comp_mask;
};

/// Memory that the card's queues may lie in.
struct Umem {
    uint32_t umem_id;
};
enum UmemMask : uint64_t { kUmemDmabuf = 1 << 0 };
struct UmemIn {
    void* addr;  ///< of a dma-buf: the offset in it
    size_t size;
    uint32_t access;       ///< ibv::Access
    uint64_t pgsz_bitmap;  ///< sizes of pages that will do
    uint64_t comp_mask;
    int dmabuf_fd;
};

/// A page of doorbell registers (user access region).
struct Uar {
    void* reg_addr;  ///< where a doorbell is stored
    void* base_addr;
    uint32_t page_id;
    off_t mmap_off;
    uint64_t comp_mask;
};
enum UarType : uint32_t {
    kUarBlueFlame = 0,                  ///< mapped write-combining
    kUarNonCached = 1,                  ///< one for the whole context: every call returns the same
    kUarNonCachedDedicated = 1u << 31,  ///< recent versions only
};

struct ProtectionDomain {
    uint32_t pdn;
    uint64_t comp_mask;
};

/// What a datagram carries; of interest is the next hop's address, which the kernel has resolved.
struct AddressVector {
    uint64_t key;
    mlx5::Be32 queue_pair;
    uint8_t rate_and_service_level;
    uint8_t path_bits;
    mlx5::Be16 lid;
    uint8_t reserved[4];
    uint8_t mac[6];
    uint8_t traffic_class;
    uint8_t hop_limit;
    mlx5::Be32 flow_label;
    uint8_t gid[16];
};
struct AddressHandle {
    AddressVector* av;
    uint64_t comp_mask;
};

/// For init_obj: which of verbs' objects to look into.
struct Handles {
    struct Pair {
        void* in;
        void* out;
    } qp, cq, srq, rwq, dm, ah, pd;
};
enum HandleType : uint64_t { kHandleAh = 1 << 5, kHandlePd = 1 << 6 };

/// Where events of objects are read.
struct EventChannel {
    int fd;
};
constexpr uint32_t kEventEntryBytes = 64;
struct Event {
    uint64_t cookie;
    uint8_t entry[kEventEntryBytes];  ///< of the card's event queue; byte 1 is the type
};

}  // namespace epcomm::fabric::devx
