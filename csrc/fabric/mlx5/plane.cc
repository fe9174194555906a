// Sets one card up.

#include "plane.h"

#include <algorithm>
#include <stdexcept>

namespace epcomm::fabric::devx {

namespace {

uint32_t power_of_two(uint32_t at_least) {
    uint32_t value = 1;
    while (value < at_least) value *= 2;
    return value;
}

}  // namespace

Plane::Plane(const NicName& name, const Options& options)
    : options_(options), card_(open_card(name, options.card)) {}

Plane::~Plane() {
    end_queues();
    close_card(&card_);
}

void Plane::end_queues() {
    // All of them before the first is destroyed: a card flushes them side by side.
    for (Connection& connection : connections_) {
        if (connection.pair != nullptr) connection.pair->stop();
    }
    connections_.clear();
    events_.reset();
    registers_.clear();
    queues_.reset();
}

uint64_t* Plane::doorbell_of(Register* target, int32_t device, Ringer* ringer) {
    const auto by_cpu = [&](const std::string& why) {
        doorbells_ = "cpu" + (why.empty() ? "" : " (" + why + ")");
        return ringer->add(target->host());
    };
    if (device < 0) {
        if (target->combining()) return by_cpu("the register is mapped write-combining");
        doorbells_ = "host";
        return target->host();
    }
    if (options_.doorbell == DoorbellBy::kCpu) return by_cpu("");
    if (target->gpu() == nullptr) {
        try {
            target->map(device);
        } catch (const std::runtime_error& error) {
            if (options_.doorbell == DoorbellBy::kGpu) {
                fail(Step::kMapping, card_.name(), error.what());
            }
            return by_cpu(std::string(error.what()) +
                          "; to let the GPU ring: " + remedy_of(Step::kMapping));
        }
    }
    doorbells_ = "gpu";
    return target->gpu();
}

void Plane::make_room(int32_t device, std::vector<Connection> connections, Ringer* ringer) {
    connections_ = std::move(connections);
    const auto count = uint32_t(connections_.size());
    layout_ = {std::min(power_of_two(uint32_t(options_.depth)), card_.limits.max_depth), count};
    registers_ = make_registers(card_, std::min(options_.registers, int32_t(count)));
    queues_ = std::make_unique<QueueMemory>(card_, device, layout_.bytes(), options_.queues);
    events_ = std::make_unique<Events>(card_);
    std::vector<mlx5::Completion> unused(layout_.depth);
    for (auto& entry : unused) entry.opcode_owner = mlx5::kInvalid << 4;
    for (Connection& connection : connections_) {
        memory().write(layout_.completions(connection.slot), unused.data(),
                       unused.size() * sizeof unused[0]);
        Register* target = registers_[connection.slot % registers_.size()].get();
        connection.doorbell = doorbell_of(target, device, ringer);
    }
}

void Plane::make_queue_pairs(uint32_t first_index) {
    for (Connection& connection : connections_) {
        QueuePlan plan;
        plan.layout = layout_;
        plan.slot = connection.slot;
        plan.index = first_index + connection.slot;
        plan.umem = queues_->umem();
        plan.register_page = registers_[connection.slot % registers_.size()]->page();
        plan.where = card_.name() + " for node " + std::to_string(connection.peer) + ", channel " +
                     std::to_string(connection.channel);
        connection.pair = std::make_unique<QueuePair>(card_, options_.card, plan);
        events_->watch(connection.pair->object(), connection.pair->completions(), connection.slot);
    }
}

mlx5::SendQueue Plane::send_queue(const Connection& connection) const {
    uint8_t* start = memory().start();
    mlx5::SendQueue queue{};
    queue.ring = reinterpret_cast<mlx5::Block*>(start + layout_.ring(connection.slot));
    queue.completions =
        reinterpret_cast<mlx5::Completion*>(start + layout_.completions(connection.slot));
    queue.record = reinterpret_cast<mlx5::Be32*>(start + layout_.record(connection.slot));
    queue.doorbell = connection.doorbell;
    queue.num_blocks = queue.num_completions = layout_.depth;
    queue.number = connection.pair->number();
    mlx5::start_at(&queue, 0);
    return queue;
}

std::string Plane::describe() const {
    std::string text = fabric::describe(card_.nic) + ", " + std::to_string(layout_.count) +
                       " queue pairs of " + std::to_string(layout_.depth) + " in " +
                       queues_->report() + ", doorbells by " + doorbells_ + " over " +
                       std::to_string(registers_.size()) + " registers";
    if (!events_->problem().empty()) text += ", no events (" + events_->problem() + ")";
    return text;
}

}  // namespace epcomm::fabric::devx
