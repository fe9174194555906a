// Lays the producers' tables out, and looks into them from outside.

#include "tables.h"

#include <stdexcept>

#include "../../mlx5/completion.h"

namespace epcomm::fabric::devx {

namespace {

/// Where the tables lie in their memory.
struct TableLayout {
    World world;
    uint64_t num_planes;
    int32_t num_signals;

    static constexpr uint64_t kQueue = sizeof(mlx5::SendQueue), kKey = sizeof(RegionKey);

    uint64_t queue(int32_t peer, int32_t channel) const {
        return uint64_t(peer * world.num_channels + channel) * kQueue;
    }
    uint64_t local() const { return queue(world.num_nodes, 0); }
    uint64_t remote() const { return local() + num_planes * EPCOMM_FABRIC_MAX_REGIONS * kKey; }
    uint64_t raised() const {
        return remote() + uint64_t(world.num_nodes) * num_planes * EPCOMM_FABRIC_MAX_REGIONS * kKey;
    }
    uint64_t bytes() const { return raised() + raised_bytes(world.num_nodes, num_signals); }
};

TableLayout layout_of(const Resources& all) {
    return {all.world, all.planes.size(), all.num_signals()};
}

/// Whether all that was asked for has completed, judged by copies of the queue and its completions:
/// a GPU's memory cannot be read otherwise.
bool is_quiet(const Resources& all, const Plane& plane, const Connection& connection) {
    mlx5::SendQueue queue;
    all.tables->read(layout_of(all).queue(connection.peer, connection.channel), &queue,
                     sizeof queue);
    std::vector<mlx5::Completion> entries(queue.num_completions);
    plane.memory().read(plane.layout().completions(connection.slot), entries.data(),
                        entries.size() * sizeof entries[0]);
    queue.completions = entries.data();
    return !mlx5::poll(&queue) || queue.done >= queue.asked;
}

}  // namespace

epcomm_ibgda fill_tables(Resources* all, const std::vector<RegionKey>& remote) {
    const TableLayout layout = layout_of(*all);
    const size_t planes = all->planes.size();
    try {
        all->tables = make_producer_arena(all->device, layout.bytes());
    } catch (const std::runtime_error& error) {
        fail(Step::kProducerMemory, "tables of queues and keys", error.what());
    }
    std::vector<RegionKey> local;
    for (size_t p = 0; p < planes; ++p) {
        for (int32_t id = 0; id < EPCOMM_FABRIC_MAX_REGIONS; ++id) {
            local.push_back(all->key(p, id, Side::kLocal));
        }
        Plane& plane = *all->planes[p];
        for (const Connection& connection : plane.connections()) {
            const mlx5::SendQueue queue = plane.send_queue(connection);
            all->tables->write(layout.queue(connection.peer, connection.channel), &queue,
                               sizeof queue);
        }
    }
    const auto write = [all](uint64_t offset, const std::vector<RegionKey>& keys) {
        all->tables->write(offset, keys.data(), keys.size() * sizeof keys[0]);
        return reinterpret_cast<const RegionKey*>(all->tables->start() + offset);
    };
    epcomm_ibgda fabric{};
    fabric.queues = all->tables->start() + layout.queue(0, 0);
    fabric.local = write(layout.local(), local);
    fabric.remote = write(layout.remote(), remote);
    const std::vector<uint8_t> zeros(raised_bytes(all->world.num_nodes, all->num_signals()));
    all->tables->write(layout.raised(), zeros.data(), zeros.size());
    fabric.raised = reinterpret_cast<uint64_t*>(all->tables->start() + layout.raised());
    fabric.num_signals = all->num_signals();
    fabric.num_channels = all->world.num_channels;
    fabric.num_nodes = all->world.num_nodes;
    fabric.num_planes = int32_t(planes);
    fabric.node = all->world.node;
    fabric.failover = all->options.failover;
    return fabric;
}

void drain(const Resources& all, int64_t timeout_ns) {
    const int64_t until = now_ns() + timeout_ns;
    for (const auto& plane : all.planes) {
        for (const Connection& connection : plane->connections()) {
            while (!is_quiet(all, *plane, connection) && now_ns() < until) relax();
        }
    }
}

}  // namespace epcomm::fabric::devx
