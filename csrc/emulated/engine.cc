// The host engine: looks at queue pairs in turn, copies with memcpy.

#include "engine.h"

#include <stdio.h>

namespace epcomm::emulated {

Network::Network(uint32_t num_nics, const LineModel& line) : nics_(new Nic[num_nics]()) {
    for (uint32_t i = 0; i < num_nics; ++i) pointers_.push_back(&nics_[i]);
    wire_.num_nics = num_nics;
    wire_.nics = pointers_.data();
    wire_.shifts = nullptr;
    // Time 0 is a little in the past, because 0 stands for "not yet" in places.
    wire_.epoch_ns = fabric::now_ns() - 1000;
    for (uint32_t i = 0; i < num_nics; ++i) nics_[i].line = line;
}

uint32_t add_key(Nic* nic, const Key& key) {
    if (nic->num_keys == kMaxKeys) return 0;
    nic->keys[nic->num_keys] = key;
    return kFirstKey + nic->num_keys++;
}

uint32_t Network::add_memory(uint32_t nic, const void* start, uint64_t bytes, uint32_t access,
                             uint32_t domain) {
    return add_key(&nics_[nic], {reinterpret_cast<uint64_t>(start), bytes, domain, access});
}

void Network::kill_nic(uint32_t nic) { fabric::store_release(&nics_[nic].dead, 1u); }

/// Places bytes and keeps account of when.
class Engine::Copier {
 public:
    Copier(Engine* engine, Traffic* traffic) : engine_(engine), traffic_(traffic) {}

    void copy(void* to, const void* from, uint64_t bytes) const {
        memcpy(to, from, bytes);
        // It may store past the caches, and such stores are not ordered by a release alone.
        if (bytes > kTailBytes) __atomic_thread_fence(__ATOMIC_SEQ_CST);
    }

    /// When the copy of `bytes` that was just made counts as done.
    Picoseconds finish(Context* context, uint64_t bytes) const {
        const EngineOptions& options = engine_->options_;
        if (!options.virtual_clock) return context->now = engine_->clock();
        if (options.copy_bytes_per_ns == 0) return context->now;
        const Picoseconds start =
            engine_->copier_free_ > context->now ? engine_->copier_free_ : context->now;
        engine_->copier_free_ = start + bytes * kNanosecond / options.copy_bytes_per_ns;
        return engine_->copier_free_;
    }

    void landed(const Context& context, const Flight& flight) const {
        Traffic& traffic = *traffic_;
        traffic.messages += 1;
        traffic.payload_bytes += flight.request.bytes;
        traffic.wire_bytes += wire_bytes(context.own().line, flight.request.bytes);
        const Schedule& times = flight.times;
        if (times.depart < traffic.first_depart) traffic.first_depart = times.depart;
        if (times.arrive > traffic.last_arrive) traffic.last_arrive = times.arrive;
        if (context.now > traffic.last_placed) traffic.last_placed = context.now;
        // Atomics copy nothing; pieces are late on purpose.
        if (flight.request.is_atomic() || flight.num_pieces > 1) return;
        const Picoseconds late =
            flight.copied_at > times.arrive ? flight.copied_at - times.arrive : 0;
        if (late > traffic.worst_late) traffic.worst_late = late;
        traffic.late_messages += late > engine_->options_.tolerance_ns * kNanosecond;
    }

 private:
    Engine* engine_;
    Traffic* traffic_;
};

Engine::Engine(Wire* wire, EngineOptions options)
    : wire_(wire),
      options_(std::move(options)),
      traffic_(wire->num_nics),
      events_(options_.journal_capacity),
      journal_{events_.data(), options_.journal_capacity, 0, 0} {}

Engine::~Engine() { stop(); }

uint32_t Engine::add_queue(uint32_t nic, const QueueMemory& memory) {
    Nic& owner = wire_->nic(nic);
    if (owner.num_queues == kMaxQueues) return 0;
    auto slot = std::make_unique<Slot>();
    slot->nic = nic;
    slot->flights.resize(memory.num_blocks);
    slot->shadow.resize(memory.num_blocks);
    QueueEntry& entry = owner.queues[owner.num_queues];
    entry = {kReset, memory.domain, 0, 0};
    QueuePair& queue = slot->queue;
    queue = {};
    queue.ring = memory.ring;
    queue.record = memory.record;
    queue.doorbell = memory.doorbell;
    queue.completions = memory.completions;
    queue.num_blocks = memory.num_blocks;
    queue.num_completions = memory.num_completions;
    queue.number = kFirstQueue + owner.num_queues++;
    queue.max_responses = memory.max_responses;
    queue.entry = &entry;
    queue.flights = slot->flights.data();
    queue.shadow = slot->shadow.data();
    queue.doorbell_seen = fabric::load_acquire(memory.doorbell);
    reset(&queue, memory.start);
    slots_.push_back(std::move(slot));
    return slots_.back()->queue.number;
}

void Engine::connect(uint32_t nic, uint32_t number, uint32_t peer_nic, uint32_t peer_number) {
    QueueEntry* entry = find_queue(wire_->nic(nic), number);
    entry->peer_nic = peer_nic;
    entry->peer_number = peer_number;
    fabric::store_release(&entry->state, uint32_t(kReady));
}

Picoseconds Engine::clock() const {
    return Picoseconds(fabric::now_ns() - wire_->epoch_ns) * kNanosecond;
}

Picoseconds Engine::now() const { return options_.virtual_clock ? virtual_now_ : clock(); }

bool Engine::step_queue(Slot* slot, Picoseconds* wake) {
    QueuePair* queue = &slot->queue;
    const Nic& nic = wire_->nic(slot->nic);
    if (fabric::load_acquire(&nic.dead) != 0) return false;
    const uint32_t state = queue->entry->state;
    if (state == kReset) return false;
    const FaultPlan faults{options_.rules.data(), uint32_t(options_.rules.size()), 0,
                           options_.seed};
    Context context{wire_, slot->nic, faults, &journal_, options_.strict, now(), *wake, false};
    Copier copier(this, &traffic_[slot->nic]);
    look_at_doorbell(&context, queue);
    if (queue->entry->state == kReady) fetch(&context, queue);
    if (queue->entry->state == kReady) land(&context, queue, copier);
    if (queue->entry->state == kReady) complete(&context, queue);
    if (queue->entry->state == kFailed) flush_all(&context, queue);
    *wake = context.wake;
    return context.progress;
}

bool Engine::visit(uint64_t order, uint64_t skip) {
    bool progress = false;
    wake_ = kNever;
    const size_t count = slots_.size();
    for (size_t i = 0; i < count; ++i) {
        if ((skip >> i % 64 & 1) != 0) continue;
        progress = step_queue(slots_[(i + order) % count].get(), &wake_) || progress;
    }
    return progress;
}

bool Engine::step() {
    if (!options_.shuffle) return visit(0, 0);
    // A queue pair may have to wait while others go on: no order holds across them.
    const uint64_t draw = mix(options_.seed, ++steps_);
    return visit(draw & 0xffff, draw >> 16);
}

bool Engine::advance() {
    if (step()) return true;
    // A shuffled step may have passed over all that could go on, and time must not.
    if (options_.shuffle && visit(0, 0)) return true;
    if (options_.virtual_clock && wake_ != kNever && wake_ > virtual_now_) virtual_now_ = wake_;
    return wake_ != kNever;
}

void Engine::settle() {
    while (advance()) {
    }
}

void Engine::check_idle() {
    for (auto& slot : slots_) {
        QueuePair* queue = &slot->queue;
        if (queue->entry->state != kReady) continue;
        const FaultPlan none{nullptr, 0, 0, 0};
        Context context{wire_, slot->nic, none, &journal_, options_.strict, now(), kNever, false};
        const uint32_t record = load_record(*queue, mlx5::kSendRecord);
        if (load_record(*queue, mlx5::kReceiveRecord) != 0) {
            violate(&context, queue, queue->posted, kReceiveRecord);
        } else if (record != (queue->posted & 0xffff)) {
            violate(&context, queue, queue->posted, kRecordWrong);
        }
    }
}

void Engine::start() {
    stopping_ = false;
    thread_ = std::thread([this] {
        while (!stopping_.load(std::memory_order_relaxed)) {
            if (!step()) fabric::relax();
        }
    });
}

void Engine::stop() {
    stopping_ = true;
    if (thread_.joinable()) thread_.join();
}

std::vector<Event> Engine::events() const {
    const uint64_t kept = journal_.count < journal_.capacity ? journal_.count : journal_.capacity;
    return {events_.begin(), events_.begin() + int64_t(kept)};
}

std::string Engine::describe(uint32_t nic) const {
    const Traffic& seen = traffic_[nic];
    const LineModel& line = wire_->nic(nic).line;
    const Picoseconds span = seen.messages == 0 ? 0 : seen.last_placed - seen.first_depart;
    const double seconds = double(span) / 1e12;
    const double rate = seconds > 0 ? double(seen.wire_bytes) / seconds / 1e9 : 0;
    char text[320];
    snprintf(text, sizeof text,
             "modelled network, NIC %u: %u GB/s, %u ns one way; %llu messages, %llu payload bytes, "
             "%.2f GB/s on the wire; limit: %s (%llu late, worst %.2f us)",
             nic, line.bytes_per_ns, line.latency_ns, (unsigned long long)seen.messages,
             (unsigned long long)seen.payload_bytes, rate,
             seen.model_was_the_limit() ? "model" : "copier",
             (unsigned long long)seen.late_messages, double(seen.worst_late) / 1e6);
    return text;
}

std::vector<FaultRule> replay(const std::vector<Event>& events) {
    std::vector<FaultRule> rules;
    for (const Event& event : events) {
        if (event.kind != EventKind::kFault) continue;
        rules.push_back({Fault(event.code), event.nic, event.queue, event.position, event.position,
                         kAlways, 1, event.amount});
    }
    return rules;
}

std::string describe(const Event& event) {
    const char* what = "";
    const char* kind = "";
    switch (event.kind) {
        case EventKind::kFault: kind = "fault", what = name(Fault(event.code)); break;
        case EventKind::kViolation: kind = "violation", what = name(Violation(event.code)); break;
        case EventKind::kFailed: kind = "failed", what = mlx5::describe(event.code); break;
        case EventKind::kRecovered: kind = "doorbell recovered"; break;
    }
    char text[256];
    snprintf(text, sizeof text, "%.3f us: NIC %u queue pair 0x%x request %llu: %s %s (%.3f us)",
             double(event.time) / 1e6, event.nic, event.queue, (unsigned long long)event.position,
             kind, what, double(event.amount) / 1e6);
    return text;
}

}  // namespace epcomm::emulated
