// csrc/mlx5/mlx5.h and csrc/fabric/mlx5/abi.h against infiniband/mlx5dv.h: numbers, sizes and
// offsets when this compiles, the bytes of the header's own setters when it runs.

#include <infiniband/mlx5dv.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <initializer_list>

#include "../../csrc/fabric/mlx5/abi.h"
#include "../../csrc/mlx5/mlx5.h"
#include "../../csrc/mlx5/request.h"

namespace ours = epcomm::mlx5;

#define SAME(a, b) static_assert(uint64_t(a) == uint64_t(b), #a " is not " #b)
#define SAME_OFFSET(a, field_a, b, field_b)                             \
    static_assert(offsetof(ours::a, field_a) == offsetof(b, field_b) && \
                      sizeof(ours::a::field_a) == sizeof(b::field_b),   \
                  #a "::" #field_a " is not where " #b "::" #field_b " is")

SAME(ours::kBlockBytes, MLX5_SEND_WQE_BB);
SAME(ours::kInline, MLX5_INLINE_SEG);
SAME(ours::kReceiveRecord, MLX5_RCV_DBR);
SAME(ours::kSendRecord, MLX5_SND_DBR);

SAME(ours::kNop, MLX5_OPCODE_NOP);
SAME(ours::kRdmaWrite, MLX5_OPCODE_RDMA_WRITE);
SAME(ours::kRdmaWriteImm, MLX5_OPCODE_RDMA_WRITE_IMM);
SAME(ours::kSend, MLX5_OPCODE_SEND);
SAME(ours::kSendImm, MLX5_OPCODE_SEND_IMM);
SAME(ours::kRdmaRead, MLX5_OPCODE_RDMA_READ);
SAME(ours::kAtomicCompareSwap, MLX5_OPCODE_ATOMIC_CS);
SAME(ours::kAtomicFetchAdd, MLX5_OPCODE_ATOMIC_FA);
SAME(ours::kAtomicMaskedCompareSwap, MLX5_OPCODE_ATOMIC_MASKED_CS);
SAME(ours::kAtomicMaskedFetchAdd, MLX5_OPCODE_ATOMIC_MASKED_FA);

SAME(ours::kCompletion, MLX5_WQE_CTRL_CQ_UPDATE);
SAME(ours::kSolicited, MLX5_WQE_CTRL_SOLICITED);
SAME(ours::kFenceAndOrdering, MLX5_WQE_CTRL_FENCE);
SAME(ours::kInitiatorFence, MLX5_WQE_CTRL_INITIATOR_SMALL_FENCE);

SAME(ours::kCompleted, MLX5_CQE_REQ);
SAME(ours::kReceivedWriteImm, MLX5_CQE_RESP_WR_IMM);
SAME(ours::kReceivedSend, MLX5_CQE_RESP_SEND);
SAME(ours::kRequestError, MLX5_CQE_REQ_ERR);
SAME(ours::kReceiveError, MLX5_CQE_RESP_ERR);
SAME(ours::kInvalid, MLX5_CQE_INVALID);
SAME(ours::kOwnerBit, MLX5_CQE_OWNER_MASK);

SAME(ours::kLocalLength, MLX5_CQE_SYNDROME_LOCAL_LENGTH_ERR);
SAME(ours::kLocalOperation, MLX5_CQE_SYNDROME_LOCAL_QP_OP_ERR);
SAME(ours::kLocalProtection, MLX5_CQE_SYNDROME_LOCAL_PROT_ERR);
SAME(ours::kFlushed, MLX5_CQE_SYNDROME_WR_FLUSH_ERR);
SAME(ours::kBadResponse, MLX5_CQE_SYNDROME_BAD_RESP_ERR);
SAME(ours::kLocalAccess, MLX5_CQE_SYNDROME_LOCAL_ACCESS_ERR);
SAME(ours::kRemoteInvalid, MLX5_CQE_SYNDROME_REMOTE_INVAL_REQ_ERR);
SAME(ours::kRemoteAccess, MLX5_CQE_SYNDROME_REMOTE_ACCESS_ERR);
SAME(ours::kRemoteOperation, MLX5_CQE_SYNDROME_REMOTE_OP_ERR);
SAME(ours::kRetryExceeded, MLX5_CQE_SYNDROME_TRANSPORT_RETRY_EXC_ERR);
SAME(ours::kReceiverNotReady, MLX5_CQE_SYNDROME_RNR_RETRY_EXC_ERR);
SAME(ours::kRemoteAborted, MLX5_CQE_SYNDROME_REMOTE_ABORTED_ERR);

SAME(sizeof(ours::Control), sizeof(mlx5_wqe_ctrl_seg));
SAME_OFFSET(Control, operation, mlx5_wqe_ctrl_seg, opmod_idx_opcode);
SAME_OFFSET(Control, queue_pair, mlx5_wqe_ctrl_seg, qpn_ds);
SAME_OFFSET(Control, signature, mlx5_wqe_ctrl_seg, signature);
SAME_OFFSET(Control, stream, mlx5_wqe_ctrl_seg, dci_stream_channel_id);
SAME_OFFSET(Control, flags, mlx5_wqe_ctrl_seg, fm_ce_se);
SAME_OFFSET(Control, immediate, mlx5_wqe_ctrl_seg, imm);
SAME(sizeof(ours::Remote), sizeof(mlx5_wqe_raddr_seg));
SAME_OFFSET(Remote, address, mlx5_wqe_raddr_seg, raddr);
SAME_OFFSET(Remote, key, mlx5_wqe_raddr_seg, rkey);
SAME(sizeof(ours::Data), sizeof(mlx5_wqe_data_seg));
SAME_OFFSET(Data, bytes, mlx5_wqe_data_seg, byte_count);
SAME_OFFSET(Data, key, mlx5_wqe_data_seg, lkey);
SAME_OFFSET(Data, address, mlx5_wqe_data_seg, addr);
SAME(sizeof(ours::InlineHeader), sizeof(mlx5_wqe_inl_data_seg));
SAME_OFFSET(InlineHeader, bytes, mlx5_wqe_inl_data_seg, byte_count);
SAME(sizeof(ours::Atomic), sizeof(mlx5_wqe_atomic_seg));
SAME_OFFSET(Atomic, operand, mlx5_wqe_atomic_seg, swap_add);
SAME_OFFSET(Atomic, compare, mlx5_wqe_atomic_seg, compare);

SAME(sizeof(ours::Completion), sizeof(mlx5_cqe64));
SAME_OFFSET(Completion, immediate, mlx5_cqe64, imm_inval_pkey);
SAME_OFFSET(Completion, bytes, mlx5_cqe64, byte_cnt);
SAME_OFFSET(Completion, timestamp, mlx5_cqe64, timestamp);
SAME_OFFSET(Completion, queue_pair, mlx5_cqe64, sop_drop_qpn);
SAME_OFFSET(Completion, index, mlx5_cqe64, wqe_counter);
SAME_OFFSET(Completion, signature, mlx5_cqe64, signature);
SAME_OFFSET(Completion, opcode_owner, mlx5_cqe64, op_own);
SAME(sizeof(ours::ErrorCompletion), sizeof(mlx5_err_cqe));
SAME_OFFSET(ErrorCompletion, vendor_syndrome, mlx5_err_cqe, vendor_err_synd);
SAME_OFFSET(ErrorCompletion, syndrome, mlx5_err_cqe, syndrome);
SAME_OFFSET(ErrorCompletion, queue_pair, mlx5_err_cqe, s_wqe_opcode_qpn);
SAME_OFFSET(ErrorCompletion, index, mlx5_err_cqe, wqe_counter);
SAME_OFFSET(ErrorCompletion, opcode_owner, mlx5_err_cqe, op_own);

namespace devx = epcomm::fabric::devx;

#define SAME_FIELD(a, field_a, b, field_b)                                                   \
    static_assert(offsetof(devx::a, field_a) == offsetof(b, field_b) &&                      \
                      sizeof(devx::a::field_a) == sizeof(static_cast<b*>(nullptr)->field_b), \
                  #a "::" #field_a " is not where " #b "::" #field_b " is")

SAME(devx::kContextDevx, MLX5DV_CONTEXT_FLAGS_DEVX);
SAME(sizeof(devx::ContextAttr), sizeof(mlx5dv_context_attr));
SAME_FIELD(ContextAttr, flags, mlx5dv_context_attr, flags);
SAME_FIELD(ContextAttr, comp_mask, mlx5dv_context_attr, comp_mask);
SAME_FIELD(Umem, umem_id, mlx5dv_devx_umem, umem_id);
SAME(devx::kUmemDmabuf, MLX5DV_UMEM_MASK_DMABUF);
SAME(sizeof(devx::UmemIn), sizeof(mlx5dv_devx_umem_in));
SAME_FIELD(UmemIn, addr, mlx5dv_devx_umem_in, addr);
SAME_FIELD(UmemIn, size, mlx5dv_devx_umem_in, size);
SAME_FIELD(UmemIn, access, mlx5dv_devx_umem_in, access);
SAME_FIELD(UmemIn, pgsz_bitmap, mlx5dv_devx_umem_in, pgsz_bitmap);
SAME_FIELD(UmemIn, comp_mask, mlx5dv_devx_umem_in, comp_mask);
SAME_FIELD(UmemIn, dmabuf_fd, mlx5dv_devx_umem_in, dmabuf_fd);
SAME(sizeof(devx::Uar), sizeof(mlx5dv_devx_uar));
SAME_FIELD(Uar, reg_addr, mlx5dv_devx_uar, reg_addr);
SAME_FIELD(Uar, page_id, mlx5dv_devx_uar, page_id);
SAME(devx::kUarBlueFlame, MLX5DV_UAR_ALLOC_TYPE_BF);
SAME(devx::kUarNonCached, MLX5DV_UAR_ALLOC_TYPE_NC);
SAME_FIELD(ProtectionDomain, pdn, mlx5dv_pd, pdn);
SAME_FIELD(ProtectionDomain, comp_mask, mlx5dv_pd, comp_mask);
SAME(sizeof(devx::AddressVector), sizeof(mlx5_wqe_av));
SAME_FIELD(AddressVector, mac, mlx5_wqe_av, rmac);
SAME_FIELD(AddressVector, gid, mlx5_wqe_av, rgid);
SAME_FIELD(AddressHandle, av, mlx5dv_ah, av);
SAME_FIELD(AddressHandle, comp_mask, mlx5dv_ah, comp_mask);
SAME(sizeof(devx::Handles), sizeof(mlx5dv_obj));
SAME(offsetof(devx::Handles, ah), offsetof(mlx5dv_obj, ah));
SAME(offsetof(devx::Handles, pd), offsetof(mlx5dv_obj, pd));
SAME(devx::kHandleAh, MLX5DV_OBJ_AH);
SAME(devx::kHandlePd, MLX5DV_OBJ_PD);
SAME_FIELD(EventChannel, fd, mlx5dv_devx_event_channel, fd);
SAME_FIELD(Event, cookie, mlx5dv_devx_async_event_hdr, cookie);
SAME(offsetof(devx::Event, entry), offsetof(mlx5dv_devx_async_event_hdr, out_data));

namespace {

int failures = 0;

void expect_bytes(const char* what, const void* seen, const void* expected, size_t bytes) {
    if (memcmp(seen, expected, bytes) == 0) return;
    ++failures;
    printf("%s:", what);
    for (const void* side : {seen, expected}) {
        printf("\n   ");
        for (size_t i = 0; i < bytes; ++i) printf(" %02x", static_cast<const uint8_t*>(side)[i]);
    }
    printf("\n");
}

/// The request as the header's setters and fields make it.
struct Theirs {
    uint8_t bytes[64] = {};

    void control(uint16_t index, uint8_t opcode, uint32_t qpn, uint8_t flags, uint8_t units) {
        mlx5dv_set_ctrl_seg(reinterpret_cast<mlx5_wqe_ctrl_seg*>(bytes), index, opcode, 0, qpn,
                            flags, units, 0, 0);
    }
    void remote(uint64_t address, uint32_t key) {
        auto* seg = reinterpret_cast<mlx5_wqe_raddr_seg*>(bytes + 16);
        seg->raddr = htobe64(address);
        seg->rkey = htobe32(key);
    }
    void data(size_t at, uint32_t size, uint32_t key, uint64_t address) {
        mlx5dv_set_data_seg(reinterpret_cast<mlx5_wqe_data_seg*>(bytes + at), size, key, address);
    }
};

void compare_requests(uint16_t index, uint32_t qpn) {
    const ours::RemotePlace remote = {0x0123456789abcdef, 0xa1b2c3d4};
    const ours::LocalPlace local = {0xfedcba9876543210, 0x5a6b7c8d};
    ours::Header header = {qpn, index, ours::kCompletion};
    ours::Block block;

    Theirs write;
    write.control(index, MLX5_OPCODE_RDMA_WRITE, qpn, MLX5_WQE_CTRL_CQ_UPDATE, 3);
    write.remote(remote.address, remote.key);
    write.data(32, 7168, local.key, local.address);
    block = ours::write_request(header, remote, local, 7168);
    expect_bytes("write", &block, write.bytes, 48);

    Theirs read = write;
    read.control(index, MLX5_OPCODE_RDMA_READ, qpn, MLX5_WQE_CTRL_CQ_UPDATE, 3);
    block = ours::read_request(header, remote, local, 7168);
    expect_bytes("read", &block, read.bytes, 48);

    header.flags = 0;
    Theirs add;
    add.control(index, MLX5_OPCODE_ATOMIC_FA, qpn, 0, 4);
    add.remote(remote.address, remote.key);
    reinterpret_cast<mlx5_wqe_atomic_seg*>(add.bytes + 32)->swap_add = htobe64(77);
    add.data(48, 8, local.key, local.address);
    block = ours::fetch_add_request(header, remote, local, 77);
    expect_bytes("fetch and add", &block, add.bytes, 64);

    for (uint32_t size : {1u, 8u, 12u, 13u, 28u}) {
        uint8_t payload[28];
        for (uint32_t i = 0; i < size; ++i) payload[i] = uint8_t(0xe0 + i);
        Theirs put;
        put.control(index, MLX5_OPCODE_RDMA_WRITE, qpn, 0, size > 12 ? 4 : 3);
        put.remote(remote.address, remote.key);
        reinterpret_cast<mlx5_wqe_inl_data_seg*>(put.bytes + 32)->byte_count =
            htobe32(size | MLX5_INLINE_SEG);
        memcpy(put.bytes + 36, payload, size);
        block = ours::inline_write_request(header, remote, payload, size);
        expect_bytes("inline write", &block, put.bytes, size > 12 ? 64 : 48);
    }

    const uint64_t word = 0x1122334455667788;
    Theirs put;
    put.control(index, MLX5_OPCODE_RDMA_WRITE, qpn, 0, 3);
    put.remote(remote.address, remote.key);
    reinterpret_cast<mlx5_wqe_inl_data_seg*>(put.bytes + 32)->byte_count =
        htobe32(8 | MLX5_INLINE_SEG);
    memcpy(put.bytes + 36, &word, 8);
    block = ours::word_request(header, remote, word);
    expect_bytes("word", &block, put.bytes, 64);

    Theirs nop;
    nop.control(index, MLX5_OPCODE_NOP, qpn, MLX5_WQE_CTRL_CQ_UPDATE, 1);
    header.flags = ours::kCompletion;
    block = ours::nop_request(header);
    expect_bytes("nop", &block, nop.bytes, 16);

    // The doorbell is a control segment's first 8 bytes.
    mlx5_wqe_ctrl_seg control = {};
    mlx5dv_set_ctrl_seg(&control, index, 0, 0, qpn, 0, 0, 0, 0);
    const ours::Doorbell doorbell = ours::next_index_doorbell(qpn, index);
    expect_bytes("doorbell", &doorbell, &control, 8);
}

void compare_completions() {
    mlx5_cqe64 theirs = {};
    theirs.sop_drop_qpn = htobe32(0x08123456);
    theirs.wqe_counter = htobe16(0xfffe);
    theirs.byte_cnt = htobe32(4096);
    theirs.op_own = MLX5_CQE_REQ_ERR << 4 | 1;
    ours::Completion entry;
    memcpy(&entry, &theirs, sizeof entry);
    if (entry.queue_pair != 0x08123456u || entry.index != 0xfffe || entry.bytes != 4096u ||
        ours::opcode_of(entry.opcode_owner) != mlx5dv_get_cqe_opcode(&theirs) ||
        (entry.opcode_owner & ours::kOwnerBit) != mlx5dv_get_cqe_owner(&theirs)) {
        ++failures;
        printf("completion: fields differ\n");
    }
}

}  // namespace

int main() {
    for (uint16_t index : {uint16_t(0), uint16_t(1), uint16_t(0x1234), uint16_t(0xffff)}) {
        for (uint32_t qpn : {1u, 0x123456u, 0xffffffu}) compare_requests(index, qpn);
    }
    compare_completions();
    if (failures == 0) printf("ok\n");
    return failures != 0;
}
