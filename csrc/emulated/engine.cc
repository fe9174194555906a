// The host engine: looks at queue pairs in turn, copies with memcpy.

#include "engine.h"

#include <stdio.h>

#include <algorithm>

#include "event_name.h"

namespace epcomm::emulated {

Network::Network(uint32_t num_nics, const LineModel& line) : nics_(new Nic[num_nics]()) {
    for (uint32_t i = 0; i < num_nics; ++i) pointers_.push_back(&nics_[i]);
    wire_.num_nics = num_nics;
    wire_.nics = pointers_.data();
    // Time 0 is a little in the past, because 0 stands for "not yet" in places.
    wire_.epoch_ns = fabric::now_ns() - 1000;
    for (uint32_t i = 0; i < num_nics; ++i) nics_[i].line = line;
}

uint32_t Network::add_memory(uint32_t nic, const void* start, uint64_t bytes, uint32_t access,
                             uint32_t domain) {
    return add_key(&nics_[nic], {reinterpret_cast<uint64_t>(start), bytes, domain, access});
}

void Network::kill_nic(uint32_t nic) { fabric::store_release(&nics_[nic].dead, 1u); }

/// Places bytes and keeps account of when.
class Engine::Copier {
 public:
    static constexpr uint64_t kWindow = mlx5::kMaxBlocks;
    static constexpr bool kCopiesAhead = false;

    Copier(Engine* engine, Slot* slot)
        : engine_(engine), slot_(slot), traffic_(&engine->traffic_[slot->nic]) {}

    static uint32_t start(mlx5::OneThread, bool wants, uint64_t, const Body& body) {
        if (!wants) return 0;
        memcpy(body.to, body.from, body.bytes);
        // It may store past the caches, and such stores are not ordered by a release alone.
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
        return body.bytes;
    }

    Picoseconds started(Context* context, uint32_t bytes) const {
        const EngineOptions& options = engine_->options_;
        if (!options.virtual_clock) return context->now = engine_->clock();
        if (options.copy_bytes_per_ns == 0) return context->now;
        const Picoseconds start =
            engine_->copier_free_ > context->now ? engine_->copier_free_ : context->now;
        engine_->copier_free_ = start + bytes * kNanosecond / options.copy_bytes_per_ns;
        return engine_->copier_free_;
    }

    Copier placer() const { return *this; }
    static Picoseconds placed(const Context& context, uint64_t) { return context.now; }
    static void settle(mlx5::OneThread, bool) {}
    static void place(uint8_t* to, const uint8_t* from, uint32_t bytes) { memcpy(to, from, bytes); }

    void landed(const Context& context, const QueuePair& queue, uint64_t position,
                const Flight& flight) const {
        traffic_->add(context, flight, engine_->options_.tolerance_ns);
        if (!engine_->passages_.wanted()) return;
        slot_->moments.landed[position & (queue.num_blocks - 1)] = context.now;
    }

    void refresh(mlx5::OneThread, Context* context) const { context->now = engine_->now(); }

 private:
    Engine* engine_;
    Slot* slot_;
    Traffic* traffic_;
};

Engine::Engine(Wire* wire, EngineOptions options)
    : wire_(wire),
      options_(std::move(options)),
      traffic_(wire->num_nics),
      events_(options_.journal_capacity),
      journal_{events_.data(), options_.journal_capacity, 0, 0} {}

Engine::~Engine() { stop(); }

void Engine::keep_passages(uint64_t capacity) {
    passages_ = {std::vector<Passage>(capacity), 0};
    for (auto& slot : slots_) slot->moments = Moments(capacity == 0 ? 0 : slot->flights.size());
}

void Engine::keep_events(uint64_t capacity) {
    newest_.resize(capacity);
    marks_.assign(capacity, 0);
    ring_ = {newest_.data(), marks_.data(), capacity, 0};
    journal_.newest = capacity == 0 ? nullptr : &ring_;
}

std::vector<Event> Engine::newest_events(uint64_t* total) const {
    const auto copy = [](const auto* from, uint64_t count, auto* into) {
        std::copy(from, from + count, into);
    };
    return read_ring(&ring_, 0, copy, total);
}

uint32_t Engine::add_queue(uint32_t nic, const QueueMemory& memory) {
    Nic& owner = wire_->nic(nic);
    const uint32_t number = emulated::add_queue(&owner, memory.domain);
    if (number == 0) return 0;
    auto slot = std::make_unique<Slot>();
    slot->nic = nic;
    slot->flights.resize(memory.num_blocks);
    slot->shadow.resize(memory.num_blocks);
    if (passages_.wanted()) slot->moments = Moments(memory.num_blocks);
    slot->queue = queue_pair(memory, number, find_queue(owner, number), slot->flights.data(),
                             slot->shadow.data());
    slot->queue.doorbell_seen = fabric::load_acquire(memory.doorbell);
    slots_.push_back(std::move(slot));
    return number;
}

void Engine::remove_queue(uint32_t nic, uint32_t number) {
    fabric::store_release(&find_queue(wire_->nic(nic), number)->state, uint32_t(kReset));
    const auto is_it = [&](const auto& slot) {
        return slot->nic == nic && slot->queue.number == number;
    };
    slots_.erase(std::remove_if(slots_.begin(), slots_.end(), is_it), slots_.end());
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

Context Engine::context_of(const Slot& slot, const FaultPlan& faults) {
    return {wire_, slot.nic, faults, &journal_, options_.strict, now(), kNever, false};
}

bool Engine::step_queue(Slot* slot, Picoseconds* wake) {
    QueuePair* queue = &slot->queue;
    if (fabric::load_acquire(&wire_->nic(slot->nic).dead) != 0) return false;
    if (!is_connected(queue)) return false;
    const FaultPlan faults{options_.rules.data(), uint32_t(options_.rules.size()), 0,
                           options_.seed};
    Context context = context_of(*slot, faults);
    context.wake = *wake;
    const uint64_t fetched = queue->fetched, completed = queue->completed;
    Copier copier(this, slot);
    emulated::step(mlx5::OneThread(), &context, queue, fabric::load_acquire(queue->doorbell),
                   copier);
    if (passages_.wanted()) {
        slot->moments.note(slot->nic, queue, fetched, completed, context.now, &passages_);
    }
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
        Context context = context_of(*slot, {nullptr, 0, 0, 0});
        emulated::check_idle(&context, &slot->queue);
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
    return emulated::describe(nic, wire_->nic(nic).line, traffic_[nic]);
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

std::string describe(uint32_t nic, const LineModel& line, const Traffic& seen) {
    const Picoseconds span = seen.messages == 0 ? 0 : seen.last_placed - seen.first_depart;
    const double seconds = double(span) / 1e12;
    const double rate = seconds > 0 ? double(seen.wire_bytes) / seconds / 1e9 : 0;
    char text[400];
    snprintf(
        text, sizeof text,
        "modelled network, NIC %u: %u GB/s, %u ns one way; %llu messages, %llu payload bytes, "
        "%.2f GB/s on the wire; limit: %s (%llu late, %llu of them by their copies, worst %.2f us)",
        nic, line.bytes_per_ns, line.latency_ns, (unsigned long long)seen.messages,
        (unsigned long long)seen.payload_bytes, rate,
        seen.model_was_the_limit() ? "model" : "copier", (unsigned long long)seen.late_messages,
        (unsigned long long)seen.late_copies, double(seen.worst_late) / 1e6);
    return text;
}

std::string describe(const Event& event) {
    char text[256];
    snprintf(text, sizeof text, "%.3f us: NIC %u queue pair 0x%x request %llu: %s (%.3f us)",
             double(event.time) / 1e6, event.nic, event.queue, (unsigned long long)event.position,
             name(event.kind, event.code).c_str(), double(event.amount) / 1e6);
    return text;
}

}  // namespace epcomm::emulated
