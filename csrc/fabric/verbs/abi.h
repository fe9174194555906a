// The part of libibverbs' binary interface that the transport uses, so that the library is built
// without its headers and opened at run time. Names are those of <infiniband/verbs.h> without the
// prefix; what is behind a pointer and never looked at stays undeclared. The layouts are a stable
// ABI (IBVERBS_1.1 and later). tests/native/verbs_parity.cc compares them with the system's header
// where it is installed.
#pragma once

#include <stdint.h>

namespace epcomm::fabric::ibv {

struct Ah;
struct Device;
struct Mr;
struct Pd;
struct Cq;
struct Qp;

enum AtomicCap : uint32_t { kAtomicNone = 0 };
enum Mtu : uint32_t { kMtu256 = 1, kMtu4096 = 5 };
enum PortState : uint32_t { kPortActive = 4 };
enum PortFlags : uint8_t { kPortNeedsGlobal = 1 << 0 };
enum LinkLayer : uint8_t { kLinkInfiniband = 1, kLinkEthernet = 2 };
enum QpType : uint32_t { kReliableConnection = 2 };
enum QpState : uint32_t { kInit = 1, kReadyToReceive = 2, kReadyToSend = 3, kError = 6 };

enum Access : int {
    kLocalWrite = 1 << 0,
    kRemoteWrite = 1 << 1,
    kRemoteRead = 1 << 2,
    kRemoteAtomic = 1 << 3,
};

enum QpAttrMask : int {
    kMaskState = 1 << 0,
    kMaskAccess = 1 << 3,
    kMaskPkeyIndex = 1 << 4,
    kMaskPort = 1 << 5,
    kMaskAddress = 1 << 7,
    kMaskPathMtu = 1 << 8,
    kMaskTimeout = 1 << 9,
    kMaskRetries = 1 << 10,
    kMaskRnrRetries = 1 << 11,
    kMaskReceivePsn = 1 << 12,
    kMaskMaxReadAtomic = 1 << 13,
    kMaskMinRnrTimer = 1 << 15,
    kMaskSendPsn = 1 << 16,
    kMaskMaxDestReadAtomic = 1 << 17,
    kMaskDestQp = 1 << 20,
};

enum Opcode : uint32_t {
    kOpWrite = 0,
    kOpWriteWithImmediate = 1,
    kOpSend = 2,
    kOpFetchAdd = 6,
};

enum SendFlags : uint32_t { kSignaled = 1 << 1, kInline = 1 << 3 };

enum Status : uint32_t {
    kSuccess = 0,
    kLocalLength = 1,
    kLocalQpOperation = 2,
    kLocalProtection = 4,
    kFlushed = 5,
    kBadResponse = 7,
    kLocalAccess = 8,
    kRemoteInvalidRequest = 9,
    kRemoteAccess = 10,
    kRemoteOperation = 11,
    kRetriesExceeded = 12,
    kRnrRetriesExceeded = 13,
    kRemoteAborted = 16,
    kFatal = 19,
    kResponseTimeout = 20,
    kGeneral = 21,
};

/// Set in the opcode of a successful completion of a receive.
constexpr uint32_t kCompletedReceive = 1 << 7;
constexpr uint32_t kCompletedReceiveWithImmediate = kCompletedReceive + 1;

struct DeviceAttr {
    char fw_ver[64];
    uint64_t node_guid, sys_image_guid, max_mr_size, page_size_cap;
    uint32_t vendor_id, vendor_part_id, hw_ver;
    int max_qp, max_qp_wr;
    unsigned device_cap_flags;
    int max_sge, max_sge_rd, max_cq, max_cqe, max_mr, max_pd;
    int max_qp_rd_atom, max_ee_rd_atom, max_res_rd_atom, max_qp_init_rd_atom, max_ee_init_rd_atom;
    AtomicCap atomic_cap;
    int unused[14];
    uint16_t max_pkeys;
    uint8_t local_ca_ack_delay, phys_port_cnt;
};

/// As the function of the library fills it, which the header's newer, longer structure extends.
struct PortAttr {
    PortState state;
    Mtu max_mtu, active_mtu;
    int gid_tbl_len;
    uint32_t port_cap_flags, max_msg_sz, bad_pkey_cntr, qkey_viol_cntr;
    uint16_t pkey_tbl_len, lid, sm_lid;
    uint8_t lmc, max_vl_num, sm_sl, subnet_timeout, init_type_reply;
    uint8_t active_width, active_speed, phys_state;
    uint8_t link_layer;
    uint8_t flags;
    uint16_t port_cap_flags2;
};

union Gid {
    uint8_t raw[16];
    uint64_t words[2];  ///< subnet prefix, interface id; big-endian
};

struct Sge {
    uint64_t addr;
    uint32_t length;
    uint32_t lkey;
};

struct SendWr {
    uint64_t wr_id;
    SendWr* next;
    Sge* sg_list;
    int num_sge;
    Opcode opcode;
    uint32_t send_flags;
    uint32_t imm_data;  ///< big-endian
    union {
        struct {
            uint64_t remote_addr;
            uint32_t rkey;
        } rdma;
        struct {
            uint64_t remote_addr, compare_add, swap;
            uint32_t rkey;
        } atomic;
    } wr;
    uint64_t unused[7];
};

struct RecvWr {
    uint64_t wr_id;
    RecvWr* next;
    Sge* sg_list;
    int num_sge;
};

struct Wc {
    uint64_t wr_id;
    Status status;
    uint32_t opcode;
    uint32_t vendor_err;
    uint32_t byte_len;
    uint32_t imm_data;  ///< big-endian
    uint32_t qp_num, src_qp;
    unsigned wc_flags;
    uint16_t pkey_index, slid;
    uint8_t sl, dlid_path_bits;
};

struct GlobalRoute {
    Gid dgid;
    uint32_t flow_label;
    uint8_t sgid_index, hop_limit, traffic_class;
};

struct AddressAttr {
    GlobalRoute grh;
    uint16_t dlid;
    uint8_t sl, src_path_bits, static_rate, is_global, port_num;
};

struct QpCap {
    uint32_t max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline_data;
};

struct QpInitAttr {
    void* qp_context;
    Cq *send_cq, *recv_cq;
    void* srq;
    QpCap cap;
    QpType qp_type;
    int sq_sig_all;
};

struct QpAttr {
    QpState qp_state, cur_qp_state;
    Mtu path_mtu;
    uint32_t path_mig_state;
    uint32_t qkey, rq_psn, sq_psn, dest_qp_num;
    unsigned qp_access_flags;
    QpCap cap;
    AddressAttr ah_attr, alt_ah_attr;
    uint16_t pkey_index, alt_pkey_index;
    uint8_t en_sqd_async_notify, sq_draining, max_rd_atomic, max_dest_rd_atomic;
    uint8_t min_rnr_timer, port_num, timeout, retry_cnt, rnr_retry, alt_port_num, alt_timeout;
    uint32_t rate_limit;
};

/// What every driver provides for the data path; the entries between are not used here.
struct ContextOps {
    void* before_poll_cq[11];
    int (*poll_cq)(Cq*, int count, Wc*);
    void* before_post_send[13];
    int (*post_send)(Qp*, SendWr*, SendWr** bad);
    int (*post_recv)(Qp*, RecvWr*, RecvWr** bad);
    void* after[5];
};

struct Context {
    Device* device;
    ContextOps ops;
};

/// The first fields of a memory region, a completion queue and a queue pair.
struct Mr {
    Context* context;
    Pd* pd;
    void* addr;
    uint64_t length;
    uint32_t handle, lkey, rkey;
};

struct Cq {
    Context* context;
};

struct Qp {
    Context* context;
    void* qp_context;
    Pd* pd;
    Cq *send_cq, *recv_cq;
    void* srq;
    uint32_t handle, qp_num;
};

}  // namespace epcomm::fabric::ibv
