// Compiles if and only if the fields of csrc/fabric/mlx5/command.h lie where Linux' header has
// them. Never run. Fields of objects in registered memory are not in that header, where they are
// reserved; they are checked to lie within the reserved bits.

#include <stddef.h>
#include <stdint.h>

using u8 = uint8_t;
#define BIT(n) (1u << (n))
#define BIT_ULL(n) (1ull << (n))
#include <linux/mlx5/mlx5_ifc.h>

#include "../../csrc/fabric/mlx5/command.h"

namespace ours = epcomm::fabric::devx;

#define NUMBER(mine, theirs) static_assert(uint64_t(ours::mine) == uint64_t(theirs), #theirs)
#define FIELD(mine, type, theirs)                                                              \
    static_assert(                                                                             \
        ours::mine.offset == offsetof(mlx5_ifc_##type##_bits, theirs) &&                       \
            ours::mine.width == sizeof(static_cast<mlx5_ifc_##type##_bits*>(nullptr)->theirs), \
        #mine " is not " #type "." #theirs)
#define START(mine, type, theirs) \
    static_assert(ours::mine.offset == offsetof(mlx5_ifc_##type##_bits, theirs), #type "." #theirs)
#define BYTES(mine, type) static_assert(ours::mine * 8 == sizeof(mlx5_ifc_##type##_bits), #type)
#define RESERVED(mine, type, theirs)                                                         \
    static_assert(ours::mine.offset >= offsetof(mlx5_ifc_##type##_bits, theirs) &&           \
                      ours::mine.offset + ours::mine.width <=                                \
                          offsetof(mlx5_ifc_##type##_bits, theirs) +                         \
                              sizeof(static_cast<mlx5_ifc_##type##_bits*>(nullptr)->theirs), \
                  #mine " is not within " #type "." #theirs)

NUMBER(kQueryCapabilities, MLX5_CMD_OP_QUERY_HCA_CAP);
NUMBER(kCreateCompletionQueue, MLX5_CMD_OP_CREATE_CQ);
NUMBER(kCreateQueuePair, MLX5_CMD_OP_CREATE_QP);
NUMBER(kResetToInit, MLX5_CMD_OP_RST2INIT_QP);
NUMBER(kInitToReceive, MLX5_CMD_OP_INIT2RTR_QP);
NUMBER(kReceiveToSend, MLX5_CMD_OP_RTR2RTS_QP);
NUMBER(kToError, MLX5_CMD_OP_2ERR_QP);
NUMBER(kQueryQueuePair, MLX5_CMD_OP_QUERY_QP);

#define HEAD(type)                     \
    FIELD(head::opcode, type, opcode); \
    FIELD(head::modifier, type, op_mod)
HEAD(query_hca_cap_in);
HEAD(create_cq_in);
HEAD(create_qp_in);
HEAD(rst2init_qp_in);
HEAD(init2rtr_qp_in);
HEAD(rtr2rts_qp_in);
HEAD(qp_2err_in);
HEAD(query_qp_in);
#define ANSWER(type)                   \
    FIELD(head::status, type, status); \
    FIELD(head::syndrome, type, syndrome)
ANSWER(query_hca_cap_out);
ANSWER(create_cq_out);
ANSWER(create_qp_out);
ANSWER(rst2init_qp_out);
ANSWER(query_qp_out);
FIELD(head::number, create_cq_out, cqn);
FIELD(head::number, create_qp_out, qpn);
FIELD(head::number, rst2init_qp_in, qpn);
FIELD(head::number, init2rtr_qp_in, qpn);
FIELD(head::number, rtr2rts_qp_in, qpn);
FIELD(head::number, qp_2err_in, qpn);
FIELD(head::number, query_qp_in, qpn);

BYTES(capabilities::kInBytes, query_hca_cap_in);
BYTES(capabilities::kOutBytes, query_hca_cap_out);
START(capabilities::body, query_hca_cap_out, capability);
FIELD(capabilities::log_max_qp_sz, cmd_hca_cap, log_max_qp_sz);
FIELD(capabilities::log_max_cq_sz, cmd_hca_cap, log_max_cq_sz);
FIELD(capabilities::log_max_msg, cmd_hca_cap, log_max_msg);
FIELD(capabilities::roce, cmd_hca_cap, roce);
FIELD(capabilities::cq_oi, cmd_hca_cap, cq_oi);
FIELD(capabilities::log_bf_reg_size, cmd_hca_cap, log_bf_reg_size);
FIELD(capabilities::sq_ts_format, cmd_hca_cap, sq_ts_format);
FIELD(capabilities::roce_qp_ts_format, roce_cap, qp_ts_format);

BYTES(completion_queue::kInBytes, create_cq_in);
BYTES(completion_queue::kOutBytes, create_cq_out);
START(completion_queue::context, create_cq_in, cq_context);
FIELD(completion_queue::umem_valid, create_cq_in, cq_umem_valid);
RESERVED(completion_queue::umem_offset, create_cq_in, reserved_at_280);
RESERVED(completion_queue::umem_id, create_cq_in, reserved_at_280);
FIELD(completion_queue::dbr_umem_valid, cqc, dbr_umem_valid);
FIELD(completion_queue::overrun_ignore, cqc, oi);
RESERVED(completion_queue::dbr_umem_id, cqc, reserved_at_20);
FIELD(completion_queue::log_size, cqc, log_cq_size);
FIELD(completion_queue::uar_page, cqc, uar_page);
FIELD(completion_queue::event_queue, cqc, c_eqn_or_apu_element);
FIELD(completion_queue::dbr_addr, cqc, dbr_addr);

BYTES(queue_pair::kInBytes, create_qp_in);
BYTES(queue_pair::kInBytes, rst2init_qp_in);
BYTES(queue_pair::kInBytes, init2rtr_qp_in);
BYTES(queue_pair::kInBytes, rtr2rts_qp_in);
BYTES(queue_pair::kOutBytes, create_qp_out);
BYTES(queue_pair::kOutBytes, rst2init_qp_out);
BYTES(queue_pair::kShortInBytes, qp_2err_in);
BYTES(queue_pair::kOutBytes, qp_2err_out);
BYTES(queue_pair::kShortInBytes, query_qp_in);
BYTES(queue_pair::kQueryOutBytes, query_qp_out);
START(queue_pair::context, create_qp_in, qpc);
START(queue_pair::context, rst2init_qp_in, qpc);
START(queue_pair::context, init2rtr_qp_in, qpc);
START(queue_pair::context, rtr2rts_qp_in, qpc);
START(queue_pair::queried_context, query_qp_out, qpc);
FIELD(queue_pair::umem_valid, create_qp_in, wq_umem_valid);
RESERVED(queue_pair::umem_offset, create_qp_in, reserved_at_800);
RESERVED(queue_pair::umem_id, create_qp_in, reserved_at_800);
FIELD(queue_pair::state, qpc, state);
FIELD(queue_pair::service, qpc, st);
FIELD(queue_pair::migration, qpc, pm_state);
FIELD(queue_pair::domain, qpc, pd);
FIELD(queue_pair::mtu, qpc, mtu);
FIELD(queue_pair::log_msg_max, qpc, log_msg_max);
FIELD(queue_pair::log_sq_size, qpc, log_sq_size);
FIELD(queue_pair::timestamp_format, qpc, ts_format);
FIELD(queue_pair::uar_page, qpc, uar_page);
FIELD(queue_pair::remote_number, qpc, remote_qpn);
START(queue_pair::path, qpc, primary_address_path);
FIELD(queue_pair::log_sra_max, qpc, log_sra_max);
FIELD(queue_pair::retry_count, qpc, retry_count);
FIELD(queue_pair::rnr_retry, qpc, rnr_retry);
FIELD(queue_pair::next_send_psn, qpc, next_send_psn);
FIELD(queue_pair::send_completions, qpc, cqn_snd);
FIELD(queue_pair::log_rra_max, qpc, log_rra_max);
FIELD(queue_pair::atomic_mode, qpc, atomic_mode);
FIELD(queue_pair::remote_read, qpc, rre);
FIELD(queue_pair::remote_write, qpc, rwe);
FIELD(queue_pair::remote_atomic, qpc, rae);
FIELD(queue_pair::min_rnr_nak, qpc, min_rnr_nak);
FIELD(queue_pair::next_receive_psn, qpc, next_rcv_psn);
FIELD(queue_pair::receive_completions, qpc, cqn_rcv);
FIELD(queue_pair::dbr_addr, qpc, dbr_addr);
FIELD(queue_pair::receive_type, qpc, rq_type);
FIELD(queue_pair::dbr_umem_valid, qpc, dbr_umem_valid);
RESERVED(queue_pair::dbr_umem_id, qpc, reserved_at_684);
FIELD(queue_pair::pkey_index, ads, pkey_index);
FIELD(queue_pair::global, ads, grh);
FIELD(queue_pair::lid, ads, rlid);
FIELD(queue_pair::ack_timeout, ads, ack_timeout);
FIELD(queue_pair::source_index, ads, src_addr_index);
FIELD(queue_pair::hop_limit, ads, hop_limit);
FIELD(queue_pair::traffic_class, ads, tclass);
START(queue_pair::gid_high, ads, rgid_rip);
FIELD(queue_pair::dscp, ads, dscp);
FIELD(queue_pair::udp_source, ads, udp_sport);
FIELD(queue_pair::ethernet_priority, ads, eth_prio);
FIELD(queue_pair::service_level, ads, sl);
FIELD(queue_pair::port, ads, vhca_port_num);
FIELD(queue_pair::mac_high, ads, rmac_47_32);
FIELD(queue_pair::mac_low, ads, rmac_31_0);

NUMBER(queue_pair::kReliable, MLX5_QPC_ST_RC);
NUMBER(queue_pair::kMigrated, MLX5_QPC_PM_STATE_MIGRATED);
NUMBER(queue_pair::kEightBytes, MLX5_QPC_ATOMIC_MODE_IB_SPEC);
NUMBER(queue_pair::kSending, MLX5_QPC_STATE_RTS);
NUMBER(queue_pair::kError, MLX5_QPC_STATE_ERR);
