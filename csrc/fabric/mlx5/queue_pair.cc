// Commands that make and connect queue pairs.

#include "queue_pair.h"

#include <errno.h>
#include <string.h>

#include <algorithm>

#include "../../mlx5/mlx5.h"

namespace epcomm::fabric::devx {

namespace {

constexpr uint64_t kPage = 4 << 10;         // what the card counts queues by
constexpr uint64_t kRecordStride = 2 * 64;  // a line for each of the two records

uint64_t pages(uint64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

/// Of the ports that stand for flows: switches choose among paths by it.
uint32_t udp_port(uint32_t mine, uint32_t theirs) {
    const uint64_t mixed = (uint64_t(mine) << 24 | theirs) * 0x9e3779b97f4a7c15u;
    return 0xc000 | uint32_t(mixed >> 50);
}

constexpr uint8_t kRnrTimer = 12;  // 0.64 ms; nothing here is ever not ready

}  // namespace

uint64_t QueueLayout::ring(uint32_t i) const {
    return i * (pages(depth * sizeof(mlx5::Block)) + pages(depth * sizeof(mlx5::Completion)));
}
uint64_t QueueLayout::completions(uint32_t i) const {
    return ring(i) + pages(depth * sizeof(mlx5::Block));
}
uint64_t QueueLayout::record(uint32_t i) const { return ring(count) + i * kRecordStride; }
uint64_t QueueLayout::completion_record(uint32_t i) const { return record(i) + kRecordStride / 2; }
uint64_t QueueLayout::bytes() const { return record(count); }

QueuePair::QueuePair(const Card& card, const VerbsOptions& options, const QueuePlan& plan)
    : card_(card), options_(options), plan_(plan) {
    try {
        make_completion_queue();
        make_queue_pair();
        Message in = change(kResetToInit);
        namespace q = queue_pair;
        const auto set = [&in](Field field, uint64_t value) {
            in.set(at(q::context, field), value);
        };
        set(q::migration, q::kMigrated);
        set(q::remote_write, 1);
        set(q::remote_read, 1);
        // Only self-tests ask for atomics, and a card may have none.
        if (card_.nic.atomics()) {
            set(q::remote_atomic, 1);
            set(q::atomic_mode, q::kEightBytes);
        }
        set(at(q::path, q::pkey_index), uint64_t(options_.pkey_index));
        set(at(q::path, q::port), uint64_t(card_.nic.name.port));
        modify(in, Step::kInit);
    } catch (...) {
        if (queue_pair_ != nullptr) library().devx_obj_destroy(queue_pair_);
        if (completion_queue_ != nullptr) library().devx_obj_destroy(completion_queue_);
        throw;
    }
}

QueuePair::~QueuePair() {
    library().devx_obj_destroy(queue_pair_);
    library().devx_obj_destroy(completion_queue_);
}

void QueuePair::make_completion_queue() {
    namespace c = completion_queue;
    Message in(c::kInBytes, kCreateCompletionQueue), out(c::kOutBytes);
    in.set(c::umem_valid, 1);
    in.set(c::umem_id, plan_.umem);
    in.set(c::umem_offset, plan_.layout.completions(plan_.slot));
    const auto set = [&in](Field field, uint64_t value) { in.set(at(c::context, field), value); };
    set(c::log_size, floor_log2(plan_.layout.depth));
    // The ring is as deep as the send queue, so nobody tells the card how far it has been read.
    set(c::overrun_ignore, 1);
    set(c::uar_page, plan_.register_page);
    set(c::event_queue, card_.event_queue);
    set(c::dbr_umem_valid, 1);
    set(c::dbr_umem_id, plan_.umem);
    set(c::dbr_addr, plan_.layout.completion_record(plan_.slot));
    completion_queue_ =
        library().devx_obj_create(card_.nic.context, in.data(), in.size(), out.data(), out.size());
    if (completion_queue_ == nullptr) {
        fail(Step::kCompletionQueue, plan_.where, describe_failure(errno, out));
    }
    completion_number_ = uint32_t(out.get(head::number));
}

void QueuePair::make_queue_pair() {
    namespace q = queue_pair;
    Message in(q::kInBytes, kCreateQueuePair), out(q::kOutBytes);
    in.set(q::umem_valid, 1);
    in.set(q::umem_id, plan_.umem);
    in.set(q::umem_offset, plan_.layout.ring(plan_.slot));
    const auto set = [&in](Field field, uint64_t value) { in.set(at(q::context, field), value); };
    set(q::service, q::kReliable);
    set(q::migration, q::kMigrated);
    set(q::domain, card_.domain);
    set(q::log_sq_size, floor_log2(plan_.layout.depth));
    set(q::receive_type, q::kNoReceives);
    set(q::timestamp_format, card_.limits.timestamp_format);
    set(q::uar_page, plan_.register_page);
    set(q::send_completions, completion_number_);
    set(q::receive_completions, completion_number_);
    set(q::dbr_umem_valid, 1);
    set(q::dbr_umem_id, plan_.umem);
    set(q::dbr_addr, plan_.layout.record(plan_.slot));
    queue_pair_ =
        library().devx_obj_create(card_.nic.context, in.data(), in.size(), out.data(), out.size());
    if (queue_pair_ == nullptr) {
        fail(Step::kQueuePair, plan_.where, describe_failure(errno, out));
    }
    endpoint_ = make_endpoint(card_.nic, options_, uint32_t(out.get(head::number)), plan_.index);
    endpoint_.max_reads = 1u << card_.limits.log_max_answers;
}

Message QueuePair::change(CommandOpcode opcode) const {
    Message in(queue_pair::kInBytes, opcode);
    in.set(head::number, endpoint_.number);
    return in;
}

void QueuePair::modify(const Message& in, Step step) const {
    Message out(queue_pair::kOutBytes);
    const int error =
        library().devx_obj_modify(queue_pair_, in.data(), in.size(), out.data(), out.size());
    if (error != 0) {
        fail(step, plan_.where,
             describe_failure(error, out) + " (address " + card_.nic.gid_text + ")");
    }
}

/// The kernel resolves it, by the tables of routes and neighbours, when it makes an address handle.
uint64_t QueuePair::find_next_hop(ibv::AddressAttr path) const {
    ibv::Ah* made = ibv::library().create_ah(card_.nic.pd, &path);
    if (made == nullptr) fail(Step::kPath, plan_.where, strerror(errno));
    AddressHandle handle{};
    Handles handles{};
    handles.ah = {made, &handle};
    const int error = library().init_obj(&handles, kHandleAh);
    uint64_t mac = 0;
    for (int i = 0; error == 0 && i < 6; ++i) mac = mac << 8 | handle.av->mac[i];
    ibv::library().destroy_ah(made);
    if (error != 0) fail(Step::kPath, plan_.where, strerror(error));
    return mac;
}

void QueuePair::set_path(Message* in, const Endpoint& remote) const {
    namespace q = queue_pair;
    const ibv::AddressAttr path = make_path(card_.nic, options_, remote);
    const auto set = [in](Field field, uint64_t value) {
        in->set(at(q::context, at(q::path, field)), value);
    };
    set(q::port, path.port_num);
    set(q::pkey_index, uint64_t(options_.pkey_index));
    if (path.is_global) {
        set(q::source_index, path.grh.sgid_index);
        set(q::hop_limit, path.grh.hop_limit);
        set(q::traffic_class, path.grh.traffic_class);
        set(q::gid_high, mlx5::swap_bytes(path.grh.dgid.words[0]));
        set(q::gid_low, mlx5::swap_bytes(path.grh.dgid.words[1]));
    }
    if (!card_.nic.ethernet()) {
        set(q::global, path.is_global);
        set(q::lid, path.dlid);
        set(q::service_level, path.sl);
        return;
    }
    const uint64_t mac = find_next_hop(path);
    set(q::mac_high, mac >> 32);
    set(q::mac_low, mac & 0xffffffff);
    set(q::ethernet_priority, path.sl & 7);
    if (!card_.nic.roce_v2) return;
    // The card takes the class of the IP header from here, not from the traffic class.
    set(q::dscp, path.grh.traffic_class >> 2);
    set(q::udp_source, udp_port(endpoint_.number, remote.number));
}

void QueuePair::connect(const Endpoint& remote, int32_t peer) {
    namespace q = queue_pair;
    check_same_network(card_.nic, remote, peer);
    Message receive = change(kInitToReceive);
    const auto set = [](Message* in, Field field, uint64_t value) {
        in->set(at(q::context, field), value);
    };
    set(&receive, q::mtu, std::min(endpoint_.mtu, remote.mtu));
    set(&receive, q::log_msg_max, card_.limits.log_max_message);
    set(&receive, q::remote_number, remote.number);
    set(&receive, q::next_receive_psn, remote.first_psn);
    set(&receive, q::min_rnr_nak, kRnrTimer);
    set(&receive, q::log_rra_max, card_.limits.log_max_answers);
    set_path(&receive, remote);
    modify(receive, Step::kReachPeer);
    Message send = change(kReceiveToSend);
    set(&send, q::next_send_psn, endpoint_.first_psn);
    set(&send, q::retry_count, uint64_t(options_.retries));
    set(&send, q::rnr_retry, uint64_t(options_.rnr_retries));
    // Not more than the peer keeps.
    set(&send, q::log_sra_max, std::min(card_.limits.log_max_reads, floor_log2(remote.max_reads)));
    set(&send, at(q::path, q::ack_timeout), uint64_t(options_.timeout));
    set(&send, at(q::path, q::port), uint64_t(card_.nic.name.port));
    modify(send, Step::kSend);
}

void QueuePair::stop() {
    Message in(queue_pair::kShortInBytes, kToError), out(queue_pair::kOutBytes);
    in.set(head::number, endpoint_.number);
    // It may be in that state already; what follows does not depend on it.
    (void)library().devx_obj_modify(queue_pair_, in.data(), in.size(), out.data(), out.size());
}

int32_t QueuePair::state() const {
    namespace q = queue_pair;
    Message in(q::kShortInBytes, kQueryQueuePair), out(q::kQueryOutBytes);
    in.set(head::number, endpoint_.number);
    const int error =
        library().devx_obj_query(queue_pair_, in.data(), in.size(), out.data(), out.size());
    return error != 0 ? -1 : int32_t(out.get(at(q::queried_context, q::state)));
}

}  // namespace epcomm::fabric::devx
