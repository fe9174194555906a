#include "emulated_nics.h"

#include <string.h>

#include <algorithm>

using namespace epcomm;
using namespace epcomm::emulated;

namespace {

Fault fault_of(const char* text) {
    int kind = 1;
    while (kind < kNumFaults && strcmp(name(Fault(kind)), text) != 0) ++kind;
    if (kind == kNumFaults) abort();
    return Fault(kind);
}

/// No rates: a core that does everybody's work is no clock. Arrivals differ by faults.
LineModel line_of(const emulated_nic_plan& plan) {
    return {0, 4096, 30, 0, 0, 1000, plan.retry_ns, 0};
}

uint32_t access_of(int32_t region) {
    if (region == EPCOMM_FABRIC_SIGNALS) return kLocalWrite | kRemoteWrite | kRemoteRead;
    const bool written = region == EPCOMM_REGION_RECEIVE || region == EPCOMM_REGION_INBOX;
    return written ? uint32_t(kRemoteWrite) : 0;
}

}  // namespace

Nics::Nics(const emulated_nic_plan& plan, const emulated_member* members, int32_t num_ranks)
    : plan_(plan),
      members_(members, members + num_ranks),
      ranks_(size_t(num_ranks)),
      network_(uint32_t(num_ranks * plan.num_planes), line_of(plan)) {
    EngineOptions options;
    options.virtual_clock = false;
    options.seed = plan.seed;
    options.shuffle = plan.shuffle != 0;
    options.rules = rules();
    engine_ = std::make_unique<Engine>(network_.wire(), std::move(options));
    for (int32_t r = 0; r < num_ranks; ++r) register_memory(r);
    for (int32_t r = 0; r < num_ranks; ++r) open_queues(r);
    for (int32_t r = 0; r < num_ranks; ++r) connect(r);
}

/// An NIC's queue pairs are made for each peer in turn, then for each of its channels.
uint32_t Nics::queue_number(int32_t rank, int32_t peer, int32_t channel) const {
    const int32_t planes = plan_.num_planes, plane = channel % planes;
    const int32_t each = (plan_.num_channels - plane + planes - 1) / planes;
    const int32_t before = epcomm_peer_index(members_[size_t(rank)].node, peer);
    return kFirstQueue + uint32_t(before * each + channel / planes);
}

std::vector<FaultRule> Nics::rules() const {
    std::vector<FaultRule> all;
    for (int32_t i = 0; i < plan_.num_rules; ++i) {
        const emulated_rule& rule = plan_.rules[i];
        const FaultRule base = {fault_of(rule.fault),
                                kAny,
                                kAny,
                                plan_.start + uint64_t(rule.first),
                                plan_.start + uint64_t(rule.last),
                                rule.chance,
                                uint32_t(rule.exact),
                                rule.amount_ns * kNanosecond};
        if (rule.rank < 0) {
            all.push_back(base);
            continue;
        }
        const emulated_member& member = members_[size_t(rule.rank)];
        for (int32_t peer = 0; peer < member.num_nodes; ++peer) {
            for (int32_t channel = 0; channel < plan_.num_channels; ++channel) {
                const bool covered = (rule.peer < 0 || rule.peer == peer) &&
                                     (rule.channel < 0 || rule.channel == channel);
                if (peer == member.node || !covered) continue;
                FaultRule one = base;
                one.nic = int32_t(nic(rule.rank, channel % plan_.num_planes));
                one.queue = queue_number(rule.rank, peer, channel);
                all.push_back(one);
            }
        }
    }
    return all;
}

void Nics::register_memory(int32_t index) {
    const emulated_member& member = members_[size_t(index)];
    Rank& rank = ranks_[size_t(index)];
    for (int32_t plane = 0; plane < plan_.num_planes; ++plane) {
        // A region's key is another one on each plane.
        for (int32_t k = 0; k < plane; ++k) {
            network_.add_memory(nic(index, plane), this, sizeof *this, 0);
        }
        for (int32_t id = 0; id < EPCOMM_FABRIC_MAX_REGIONS; ++id) {
            Key key = {};
            if (id < member.num_regions) {
                key.address = reinterpret_cast<uint64_t>(member.regions[id]);
                key.bytes = member.sizes[id];
                key.key = network_.add_memory(nic(index, plane), member.regions[id],
                                              member.sizes[id], access_of(id));
            }
            rank.local.push_back(key);
        }
    }
}

void Nics::open_queues(int32_t index) {
    const emulated_member& member = members_[size_t(index)];
    Rank& rank = ranks_[size_t(index)];
    rank.queues.resize(size_t(member.num_nodes * plan_.num_channels));
    rank.memory.resize(rank.queues.size());
    for (size_t i = 0; i < rank.queues.size(); ++i) {
        const int32_t peer = int32_t(i) / plan_.num_channels;
        const int32_t channel = int32_t(i) % plan_.num_channels;
        if (peer == member.node) continue;
        Queue& memory = rank.memory[i];
        memory.ring.resize(plan_.num_blocks);
        memory.completions.resize(plan_.num_blocks);
        for (auto& entry : memory.completions) entry.opcode_owner = mlx5::kInvalid << 4;
        memory.record[mlx5::kSendRecord] = uint32_t(plan_.start & 0xffff);
        mlx5::SendQueue& queue = rank.queues[i];
        queue.ring = memory.ring.data();
        queue.completions = memory.completions.data();
        queue.record = memory.record;
        queue.doorbell = &memory.doorbell;
        queue.num_blocks = queue.num_completions = plan_.num_blocks;
        queue.number =
            engine_->add_queue(nic(index, channel % plan_.num_planes),
                               {queue.ring, queue.record, queue.doorbell, queue.completions,
                                plan_.num_blocks, plan_.num_blocks, plan_.start});
        if (queue.number != queue_number(index, peer, channel)) abort();
        mlx5::start_at(&queue, plan_.start);
    }
}

void Nics::connect(int32_t index) {
    const emulated_member& member = members_[size_t(index)];
    Rank& rank = ranks_[size_t(index)];
    for (int32_t n = 0; n < member.num_nodes; ++n) {
        const std::vector<Key>& theirs = ranks_[size_t(member.rail[n])].local;
        rank.remote.insert(rank.remote.end(), theirs.begin(), theirs.end());
        for (int32_t c = 0; n != member.node && c < plan_.num_channels; ++c) {
            const int32_t plane = c % plan_.num_planes;
            engine_->connect(nic(index, plane), queue_number(index, n, c),
                             nic(member.rail[n], plane),
                             queue_number(member.rail[n], member.node, c));
        }
    }
    const auto num_signals = int32_t(fabric::signals_in(member.sizes[EPCOMM_FABRIC_SIGNALS]));
    rank.raised.resize(fabric::raised_bytes(member.num_nodes, num_signals) / sizeof(uint64_t));
    rank.fabric = {rank.queues.data(), rank.local.data(),  rank.remote.data(), member.state,
                   plan_.timeout_ns,   plan_.num_channels, member.num_nodes,   plan_.num_planes,
                   member.node,        num_signals,        plan_.failover,     rank.raised.data()};
}

void Nics::kill(int32_t rank) {
    killed_ = true;
    for (int32_t plane = 0; plane < plan_.num_planes; ++plane) network_.kill_nic(nic(rank, plane));
}

std::string Nics::finish(int64_t limit_ns) {
    const int64_t until = fabric::now_ns() + limit_ns;
    while (engine_->advance() && fabric::now_ns() < until) {
    }
    // A dead NIC has not read what is in its records.
    if (!killed_ && !engine_->advance()) engine_->check_idle();
    std::string text;
    for (const Event& event : engine_->events()) {
        if (event.kind == EventKind::kViolation) text += describe(event) + "\n";
    }
    return text;
}

uint64_t Nics::count_faults() const {
    const std::vector<Event> events = engine_->events();
    return uint64_t(std::count_if(events.begin(), events.end(), [](const Event& event) {
        return event.kind == EventKind::kFault;
    }));
}

extern "C" {

Nics* emulated_nics_make(const emulated_nic_plan* plan, const emulated_member* members,
                         int32_t num_ranks) {
    return new Nics(*plan, members, num_ranks);
}

const epcomm_ibgda* emulated_nics_fabric(const Nics* nics, int32_t rank) {
    return nics->fabric_of(rank);
}

void emulated_nics_kill(Nics* nics, int32_t rank) { nics->kill(rank); }

/// What rules were broken, in words.
void emulated_nics_finish(Nics* nics, int64_t limit_ns, char* into, int64_t capacity) {
    snprintf(into, size_t(capacity), "%s", nics->finish(limit_ns).c_str());
}

uint64_t emulated_nics_faults(const Nics* nics) { return nics->count_faults(); }

void emulated_nics_free(Nics* nics) { delete nics; }

}  // extern "C"
