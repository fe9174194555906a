// Compiles if and only if our declarations of libibverbs agree with the system's header in the size
// of every structure, the place of every field that is used, and every number. Never run.

#include <infiniband/verbs.h>
#include <stddef.h>

#include "../../csrc/fabric/verbs/abi.h"

namespace ours = epcomm::fabric::ibv;

#define SIZE(mine, theirs) static_assert(sizeof(ours::mine) == sizeof(theirs), #theirs)
#define FIELD(mine, my_field, theirs, field)                                                      \
    static_assert(offsetof(ours::mine, my_field) == offsetof(theirs, field), #theirs "." #field); \
    static_assert(sizeof(ours::mine::my_field) == sizeof(theirs::field), #theirs "." #field)
#define SAME(mine, theirs, field) FIELD(mine, field, theirs, field)
#define VALUE(mine, theirs) static_assert(int64_t(ours::mine) == int64_t(theirs), #theirs)

SIZE(DeviceAttr, ibv_device_attr);
SAME(DeviceAttr, ibv_device_attr, fw_ver);
SAME(DeviceAttr, ibv_device_attr, vendor_id);
SAME(DeviceAttr, ibv_device_attr, max_qp_wr);
SAME(DeviceAttr, ibv_device_attr, max_cqe);
SAME(DeviceAttr, ibv_device_attr, max_qp_rd_atom);
SAME(DeviceAttr, ibv_device_attr, max_qp_init_rd_atom);
SAME(DeviceAttr, ibv_device_attr, atomic_cap);
SAME(DeviceAttr, ibv_device_attr, max_pkeys);
SAME(DeviceAttr, ibv_device_attr, phys_port_cnt);

// Newer headers append to it; ours must hold what the function fills, and no more is read.
static_assert(sizeof(ours::PortAttr) <= sizeof(ibv_port_attr), "ibv_port_attr");
SAME(PortAttr, ibv_port_attr, state);
SAME(PortAttr, ibv_port_attr, active_mtu);
SAME(PortAttr, ibv_port_attr, gid_tbl_len);
SAME(PortAttr, ibv_port_attr, lid);
SAME(PortAttr, ibv_port_attr, link_layer);
SAME(PortAttr, ibv_port_attr, flags);
SAME(PortAttr, ibv_port_attr, port_cap_flags2);

SIZE(Gid, ibv_gid);
SIZE(Sge, ibv_sge);
SAME(Sge, ibv_sge, addr);
SAME(Sge, ibv_sge, length);
SAME(Sge, ibv_sge, lkey);

SIZE(SendWr, ibv_send_wr);
SAME(SendWr, ibv_send_wr, wr_id);
SAME(SendWr, ibv_send_wr, next);
SAME(SendWr, ibv_send_wr, sg_list);
SAME(SendWr, ibv_send_wr, num_sge);
SAME(SendWr, ibv_send_wr, opcode);
SAME(SendWr, ibv_send_wr, send_flags);
SAME(SendWr, ibv_send_wr, imm_data);
SAME(SendWr, ibv_send_wr, wr.rdma.remote_addr);
SAME(SendWr, ibv_send_wr, wr.rdma.rkey);
SAME(SendWr, ibv_send_wr, wr.atomic.remote_addr);
SAME(SendWr, ibv_send_wr, wr.atomic.compare_add);
SAME(SendWr, ibv_send_wr, wr.atomic.rkey);

SIZE(RecvWr, ibv_recv_wr);
SAME(RecvWr, ibv_recv_wr, sg_list);
SAME(RecvWr, ibv_recv_wr, num_sge);

SIZE(Wc, ibv_wc);
SAME(Wc, ibv_wc, wr_id);
SAME(Wc, ibv_wc, status);
SAME(Wc, ibv_wc, opcode);
SAME(Wc, ibv_wc, vendor_err);
SAME(Wc, ibv_wc, byte_len);
SAME(Wc, ibv_wc, imm_data);
SAME(Wc, ibv_wc, qp_num);

SIZE(GlobalRoute, ibv_global_route);
SAME(GlobalRoute, ibv_global_route, sgid_index);
SAME(GlobalRoute, ibv_global_route, traffic_class);
SIZE(AddressAttr, ibv_ah_attr);
SAME(AddressAttr, ibv_ah_attr, dlid);
SAME(AddressAttr, ibv_ah_attr, sl);
SAME(AddressAttr, ibv_ah_attr, is_global);
SAME(AddressAttr, ibv_ah_attr, port_num);

SIZE(QpCap, ibv_qp_cap);
SAME(QpCap, ibv_qp_cap, max_inline_data);
SIZE(QpInitAttr, ibv_qp_init_attr);
SAME(QpInitAttr, ibv_qp_init_attr, send_cq);
SAME(QpInitAttr, ibv_qp_init_attr, cap);
SAME(QpInitAttr, ibv_qp_init_attr, qp_type);
SIZE(QpAttr, ibv_qp_attr);
SAME(QpAttr, ibv_qp_attr, path_mtu);
SAME(QpAttr, ibv_qp_attr, rq_psn);
SAME(QpAttr, ibv_qp_attr, sq_psn);
SAME(QpAttr, ibv_qp_attr, dest_qp_num);
SAME(QpAttr, ibv_qp_attr, qp_access_flags);
SAME(QpAttr, ibv_qp_attr, ah_attr);
SAME(QpAttr, ibv_qp_attr, pkey_index);
SAME(QpAttr, ibv_qp_attr, max_rd_atomic);
SAME(QpAttr, ibv_qp_attr, max_dest_rd_atomic);
SAME(QpAttr, ibv_qp_attr, min_rnr_timer);
SAME(QpAttr, ibv_qp_attr, port_num);
SAME(QpAttr, ibv_qp_attr, timeout);
SAME(QpAttr, ibv_qp_attr, retry_cnt);
SAME(QpAttr, ibv_qp_attr, rnr_retry);

SIZE(ContextOps, ibv_context_ops);
SAME(ContextOps, ibv_context_ops, poll_cq);
SAME(ContextOps, ibv_context_ops, post_send);
SAME(ContextOps, ibv_context_ops, post_recv);
SAME(Context, ibv_context, device);
SAME(Context, ibv_context, ops);
SAME(Mr, ibv_mr, lkey);
SAME(Mr, ibv_mr, rkey);
SAME(Cq, ibv_cq, context);
SAME(Qp, ibv_qp, context);
SAME(Qp, ibv_qp, qp_num);

VALUE(kAtomicNone, IBV_ATOMIC_NONE);
VALUE(kMtu256, IBV_MTU_256);
VALUE(kMtu4096, IBV_MTU_4096);
VALUE(kPortActive, IBV_PORT_ACTIVE);
VALUE(kPortNeedsGlobal, IBV_QPF_GRH_REQUIRED);
VALUE(kLinkInfiniband, IBV_LINK_LAYER_INFINIBAND);
VALUE(kLinkEthernet, IBV_LINK_LAYER_ETHERNET);
VALUE(kReliableConnection, IBV_QPT_RC);
VALUE(kInit, IBV_QPS_INIT);
VALUE(kReadyToReceive, IBV_QPS_RTR);
VALUE(kReadyToSend, IBV_QPS_RTS);
VALUE(kError, IBV_QPS_ERR);
VALUE(kLocalWrite, IBV_ACCESS_LOCAL_WRITE);
VALUE(kRemoteWrite, IBV_ACCESS_REMOTE_WRITE);
VALUE(kRemoteRead, IBV_ACCESS_REMOTE_READ);
VALUE(kRemoteAtomic, IBV_ACCESS_REMOTE_ATOMIC);
VALUE(kMaskState, IBV_QP_STATE);
VALUE(kMaskAccess, IBV_QP_ACCESS_FLAGS);
VALUE(kMaskPkeyIndex, IBV_QP_PKEY_INDEX);
VALUE(kMaskPort, IBV_QP_PORT);
VALUE(kMaskAddress, IBV_QP_AV);
VALUE(kMaskPathMtu, IBV_QP_PATH_MTU);
VALUE(kMaskTimeout, IBV_QP_TIMEOUT);
VALUE(kMaskRetries, IBV_QP_RETRY_CNT);
VALUE(kMaskRnrRetries, IBV_QP_RNR_RETRY);
VALUE(kMaskReceivePsn, IBV_QP_RQ_PSN);
VALUE(kMaskMaxReadAtomic, IBV_QP_MAX_QP_RD_ATOMIC);
VALUE(kMaskMinRnrTimer, IBV_QP_MIN_RNR_TIMER);
VALUE(kMaskSendPsn, IBV_QP_SQ_PSN);
VALUE(kMaskMaxDestReadAtomic, IBV_QP_MAX_DEST_RD_ATOMIC);
VALUE(kMaskDestQp, IBV_QP_DEST_QPN);
VALUE(kOpWrite, IBV_WR_RDMA_WRITE);
VALUE(kOpWriteWithImmediate, IBV_WR_RDMA_WRITE_WITH_IMM);
VALUE(kOpSend, IBV_WR_SEND);
VALUE(kOpFetchAdd, IBV_WR_ATOMIC_FETCH_AND_ADD);
VALUE(kSignaled, IBV_SEND_SIGNALED);
VALUE(kInline, IBV_SEND_INLINE);
VALUE(kSuccess, IBV_WC_SUCCESS);
VALUE(kLocalLength, IBV_WC_LOC_LEN_ERR);
VALUE(kLocalQpOperation, IBV_WC_LOC_QP_OP_ERR);
VALUE(kLocalProtection, IBV_WC_LOC_PROT_ERR);
VALUE(kFlushed, IBV_WC_WR_FLUSH_ERR);
VALUE(kBadResponse, IBV_WC_BAD_RESP_ERR);
VALUE(kLocalAccess, IBV_WC_LOC_ACCESS_ERR);
VALUE(kRemoteInvalidRequest, IBV_WC_REM_INV_REQ_ERR);
VALUE(kRemoteAccess, IBV_WC_REM_ACCESS_ERR);
VALUE(kRemoteOperation, IBV_WC_REM_OP_ERR);
VALUE(kRetriesExceeded, IBV_WC_RETRY_EXC_ERR);
VALUE(kRnrRetriesExceeded, IBV_WC_RNR_RETRY_EXC_ERR);
VALUE(kRemoteAborted, IBV_WC_REM_ABORT_ERR);
VALUE(kFatal, IBV_WC_FATAL_ERR);
VALUE(kResponseTimeout, IBV_WC_RESP_TIMEOUT_ERR);
VALUE(kGeneral, IBV_WC_GENERAL_ERR);
VALUE(kCompletedReceive, IBV_WC_RECV);
VALUE(kCompletedReceiveWithImmediate, IBV_WC_RECV_RDMA_WITH_IMM);
