// Makes work requests of operations, and operations' ends of completions.

#include "queue_pair.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <stdexcept>

namespace epcomm::fabric {

namespace {

// An operation is at most a write and a signal.
constexpr int32_t kRequestsPerOperation = 2;

}  // namespace

int32_t QueuePair::num_receives() const { return plan_.depth + 8; }

uint64_t QueuePair::memory_bytes(int32_t depth) {
    return 64 + (uint64_t(depth) * 2 + 8) * sizeof(Notice);
}

QueuePair::QueuePair(const Nic& nic, ibv::Cq* queue, QueueMemory memory, const QueuePairPlan& plan,
                     const VerbsOptions& options)
    : nic_(nic), options_(options), memory_(memory), plan_(plan) {
    ibv::QpInitAttr wanted{};
    wanted.send_cq = wanted.recv_cq = queue;
    wanted.qp_type = ibv::kReliableConnection;
    wanted.cap.max_send_wr = uint32_t(plan.depth * kRequestsPerOperation);
    wanted.cap.max_recv_wr = uint32_t(num_receives());
    wanted.cap.max_send_sge = wanted.cap.max_recv_sge = 1;
    // A card that cannot do as much inline says so by failing.
    for (uint32_t bytes = uint32_t(options.inline_bytes);; bytes /= 2) {
        wanted.cap.max_inline_data = bytes;
        ibv::QpInitAttr attributes = wanted;
        queue_pair_ = ibv::library().create_qp(nic.pd, &attributes);
        if (queue_pair_ != nullptr) {
            inline_bytes_ =
                std::min(attributes.cap.max_inline_data, uint32_t(options.inline_bytes));
            break;
        }
        if (bytes == 0) {
            throw std::runtime_error(nic.name.device + " cannot make a queue pair (" +
                                     strerror(errno) + "); it can have " +
                                     std::to_string(nic.device.max_qp) + " of " +
                                     std::to_string(nic.device.max_qp_wr) + " requests");
        }
    }
    ibv::QpAttr attributes{};
    attributes.qp_state = ibv::kInit;
    attributes.pkey_index = uint16_t(options.pkey_index);
    attributes.port_num = uint8_t(nic.name.port);
    attributes.qp_access_flags = ibv::kRemoteWrite | (nic.atomics() ? int(ibv::kRemoteAtomic) : 0);
    try {
        modify(&attributes,
               ibv::kMaskState | ibv::kMaskPkeyIndex | ibv::kMaskPort | ibv::kMaskAccess,
               "be set up");
    } catch (...) {
        ibv::library().destroy_qp(queue_pair_);
        throw;
    }
    endpoint_ = make_endpoint(nic, options, queue_pair_->qp_num, plan.index);
    endpoint_.nic = uint8_t(plan.nic);
    under_way_.resize(size_t(plan.depth));
    batch_.reserve(size_t(plan.depth * kRequestsPerOperation));
    places_.reserve(batch_.capacity());
}

QueuePair::~QueuePair() {
    // Requests under way are flushed, so that the card lets go of the memory at once.
    ibv::QpAttr attributes{};
    attributes.qp_state = ibv::kError;
    ibv::library().modify_qp(queue_pair_, &attributes, ibv::kMaskState);
    ibv::library().destroy_qp(queue_pair_);
}

void QueuePair::modify(ibv::QpAttr* attributes, int mask, const char* step) {
    const int error = ibv::library().modify_qp(queue_pair_, attributes, mask);
    if (error != 0) {
        throw std::runtime_error("queue pair " + std::to_string(queue_pair_->qp_num) + " of " +
                                 nic_.name.device + " for node " + std::to_string(plan_.peer) +
                                 " cannot " + step + ": " + strerror(error) + " (address " +
                                 nic_.gid_text + ")");
    }
}

void QueuePair::connect(const Endpoint& remote, std::vector<RemoteRegion> regions, bool notices) {
    check_same_network(nic_, remote, plan_.peer);
    regions_ = std::move(regions);
    notices_ = notices;
    if (notices) {
        for (int32_t slot = 0; slot < num_receives(); ++slot) post_receive(uint32_t(slot));
    }
    ibv::QpAttr attributes{};
    attributes.ah_attr = make_path(nic_, options_, remote);
    attributes.qp_state = ibv::kReadyToReceive;
    attributes.path_mtu = ibv::Mtu(std::min(endpoint_.mtu, remote.mtu));
    attributes.dest_qp_num = remote.number;
    attributes.rq_psn = remote.first_psn;
    attributes.max_dest_rd_atomic = uint8_t(endpoint_.max_reads);
    attributes.min_rnr_timer = 12;  // 0.64 ms
    modify(&attributes,
           ibv::kMaskState | ibv::kMaskAddress | ibv::kMaskPathMtu | ibv::kMaskDestQp |
               ibv::kMaskReceivePsn | ibv::kMaskMaxDestReadAtomic | ibv::kMaskMinRnrTimer,
           "reach its peer");
    attributes.qp_state = ibv::kReadyToSend;
    attributes.timeout = uint8_t(options_.timeout);
    attributes.retry_cnt = uint8_t(options_.retries);
    attributes.rnr_retry = uint8_t(options_.rnr_retries);
    attributes.sq_psn = endpoint_.first_psn;
    // More than the responder keeps would corrupt what it replays.
    attributes.max_rd_atomic = uint8_t(std::min<uint32_t>(
        {uint32_t(nic_.device.max_qp_init_rd_atom), remote.max_reads, uint32_t(kMaxReads)}));
    modify(&attributes,
           ibv::kMaskState | ibv::kMaskTimeout | ibv::kMaskRetries | ibv::kMaskRnrRetries |
               ibv::kMaskSendPsn | ibv::kMaskMaxReadAtomic,
           "start sending");
}

bool QueuePair::refuse(const Operation& operation, ibv::Status status, Failure* failure) const {
    *failure = {operation.command, status, 0, queue_pair_->qp_num, false, false, nic_.name.device};
    return false;
}

// What no card could find: a region without a key, a signal that this side would have to place.
bool QueuePair::check(const Operation& operation, const RegisteredRegion* local,
                      Failure* failure) const {
    const Command& command = operation.command;
    const bool moves = command.op != EPCOMM_FABRIC_SIGNAL_ADD && command.op != EPCOMM_FABRIC_NOOP &&
                       command.bytes > 0;
    if (moves && local == nullptr) return refuse(operation, ibv::kLocalProtection, failure);
    if (moves && (size_t(command.remote.region) >= regions_.size() ||
                  !regions_[size_t(command.remote.region)].known)) {
        return refuse(operation, ibv::kRemoteAccess, failure);
    }
    const RemoteRegion& signals = regions_[EPCOMM_FABRIC_SIGNALS];
    const bool raises = command.op != EPCOMM_FABRIC_PUT && command.op != EPCOMM_FABRIC_NOOP;
    if (raises && (!signals.known ||
                   (notices_ && uint64_t(command.signal) >= signals.bytes / sizeof(uint64_t)))) {
        return refuse(operation, ibv::kRemoteAccess, failure);
    }
    // The peer's proxy copies what a notice says, which its card cannot check.
    const bool mirrored = moves && regions_[size_t(command.remote.region)].mirrored;
    if (mirrored &&
        command.remote.offset + command.bytes > regions_[size_t(command.remote.region)].bytes) {
        return refuse(operation, ibv::kRemoteAccess, failure);
    }
    if (moves && local->mirror != nullptr &&
        !local->mirror->fetch(command.local.offset, command.bytes)) {
        return refuse(operation, ibv::kLocalAccess, failure);
    }
    return true;
}

ibv::SendWr* QueuePair::add_request(ibv::Opcode opcode, uint64_t address, uint32_t bytes,
                                    uint32_t key) {
    places_.push_back({address, bytes, key});
    batch_.push_back({});
    ibv::SendWr* request = &batch_.back();
    request->opcode = opcode;
    request->sg_list = &places_.back();
    request->num_sge = bytes > 0 ? 1 : 0;
    request->wr_id = request_id(false);
    if (batch_.size() > 1) batch_[batch_.size() - 2].next = request;
    return request;
}

void QueuePair::add_write(const Command& command, const RegisteredRegion* local,
                          const RemoteRegion& remote) {
    const bool some = command.bytes > 0;
    ibv::SendWr* request =
        some ? add_request(ibv::kOpWrite,
                           reinterpret_cast<uint64_t>(local->wire + command.local.offset),
                           uint32_t(command.bytes), local->keys[plan_.nic]->lkey)
             : add_request(ibv::kOpWrite, 0, 0, 0);
    request->wr.rdma.remote_addr = remote.address + command.remote.offset;
    request->wr.rdma.rkey = remote.key;
    // The processor reads inline bytes, so they must be its own memory.
    const bool readable =
        some && (local->region.memory == Memory::kHost || local->mirror != nullptr);
    if (readable && command.bytes <= inline_bytes_) request->send_flags |= ibv::kInline;
}

void QueuePair::add_fetch_add(uint32_t signal, uint64_t value) {
    const RemoteRegion& signals = regions_[EPCOMM_FABRIC_SIGNALS];
    ibv::SendWr* request = add_request(ibv::kOpFetchAdd, reinterpret_cast<uint64_t>(sink()),
                                       sizeof(uint64_t), memory_.key->lkey);
    request->wr_id = request_id(true);
    request->wr.atomic.remote_addr = signals.address + uint64_t(signal) * sizeof(uint64_t);
    request->wr.atomic.rkey = signals.key;
    request->wr.atomic.compare_add = value;
}

void QueuePair::add_notice(const Notice& notice) {
    // As many places as operations: this one's last user has completed.
    Notice* place = outgoing() + notices_sent_++ % uint64_t(plan_.depth);
    *place = notice;
    ibv::SendWr* request = add_request(ibv::kOpSend, reinterpret_cast<uint64_t>(place),
                                       sizeof(Notice), memory_.key->lkey);
    request->wr_id = request_id(true);
    if (sizeof(Notice) <= inline_bytes_) request->send_flags |= ibv::kInline;
}

bool QueuePair::append(const Operation& operation, const RegisteredRegion* local,
                       Failure* failure) {
    if (!check(operation, local, failure)) return false;
    const Command& command = operation.command;
    const bool add = command.op == EPCOMM_FABRIC_SIGNAL_ADD;
    const uint64_t value = add ? command.value : command.op == EPCOMM_FABRIC_PUT_SIGNAL ? 1 : 0;
    const uint64_t bytes = add || command.op == EPCOMM_FABRIC_NOOP ? 0 : command.bytes;
    const RemoteRegion& remote = regions_[bytes > 0 ? size_t(command.remote.region) : 0];
    const bool mirrored = bytes > 0 && remote.mirrored;
    if (bytes > 0 || value == 0) add_write(command, local, remote);
    if (!notices_) {
        if (value > 0) add_fetch_add(uint32_t(command.signal), value);
    } else if (value == 1 && bytes > 0 && !mirrored) {
        batch_.back().opcode = ibv::kOpWriteWithImmediate;
        batch_.back().imm_data = htonl(uint32_t(command.signal));
    } else if (value > 0 || mirrored) {
        add_notice({value, command.remote.offset, mirrored ? bytes : 0, uint32_t(command.signal),
                    uint32_t(command.remote.region)});
    }
    operation_of(posted_++) = operation;
    return true;
}

bool QueuePair::send(Failure* failure, uint64_t* token) {
    if (batch_.empty()) return true;
    batch_.back().send_flags |= ibv::kSignaled;
    ibv::SendWr* bad = nullptr;
    const int error = queue_pair_->context->ops.post_send(queue_pair_, batch_.data(), &bad);
    if (error != 0) {
        ibv::Wc refused{};
        refused.wr_id = bad != nullptr ? bad->wr_id : batch_.front().wr_id;
        refused.status = ibv::kLocalQpOperation;
        refused.vendor_err = uint32_t(error);
        const Operation& operation = operation_of(number_of(refused.wr_id));
        *token = operation.token;
        *failure = failure_of(operation.command, refused);
    }
    batch_.clear();
    places_.clear();
    return error == 0;
}

Failure QueuePair::failure_of(const Command& command, const ibv::Wc& completion) const {
    const bool of_signal = (completion.wr_id >> 62 & 1) != 0;
    return {command, completion.status, completion.vendor_err, queue_pair_->qp_num, of_signal,
            true,    nic_.name.device};
}

bool QueuePair::finish(const ibv::Wc& completion, std::vector<uint64_t>* tokens, Failure* failure) {
    const uint64_t last = number_of(completion.wr_id);
    // The signal behind a write that failed is flushed; its operation has ended with the write.
    if (last < completed_) return true;
    while (completed_ <= last) tokens->push_back(operation_of(completed_++).token);
    if (completion.status == ibv::kSuccess) return true;
    *failure = failure_of(operation_of(last).command, completion);
    return false;
}

void QueuePair::post_receive(uint32_t slot) {
    ibv::Sge place{reinterpret_cast<uint64_t>(incoming() + slot), sizeof(Notice),
                   memory_.key->lkey};
    ibv::RecvWr request{};
    request.wr_id = uint64_t(1) << 63 | uint64_t(plan_.index) << 32 | slot;
    request.sg_list = &place;
    request.num_sge = 1;
    ibv::RecvWr* bad = nullptr;
    // Refused only by a queue pair that has failed, which the sending side reports.
    (void)queue_pair_->context->ops.post_recv(queue_pair_, &request, &bad);
}

void QueuePair::receive(const ibv::Wc& completion, Receiver* receiver) {
    if (completion.status != ibv::kSuccess) return;
    const uint32_t slot = uint32_t(completion.wr_id);
    if (completion.opcode == ibv::kCompletedReceiveWithImmediate) {
        receiver->arrived({1, 0, 0, ntohl(completion.imm_data), 0});
    } else {
        receiver->arrived(incoming()[slot]);
    }
    post_receive(slot);
}

}  // namespace epcomm::fabric
