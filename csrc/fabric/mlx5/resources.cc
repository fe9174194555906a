// Makes a rank's cards, regions and queues, and ends them.

#include "resources.h"

#include <algorithm>
#include <stdexcept>

#include "../queues.h"

namespace epcomm::fabric::devx {

namespace {

std::vector<Nic> nics_of(const Resources& all) {
    std::vector<Nic> nics;
    for (const auto& plane : all.planes) nics.push_back(plane->card().nic);
    return nics;
}

std::string names_of(const std::vector<Nic>& nics) {
    std::string names;
    for (const Nic& nic : nics) names += (names.empty() ? "" : ", ") + nic.name.device;
    return names;
}

}  // namespace

Resources::~Resources() {
    // Nobody rings for queues that end, and no key ends before the queues that use it.
    ringer.reset();
    for (auto& plane : planes) plane->end_queues();
    for (RegisteredRegion& region : regions) unregister_region(&region);
    planes.clear();
}

epcomm_region_key Resources::key(size_t plane, int32_t id, Side side) const {
    const RegisteredRegion& region = regions[size_t(id)];
    if (region.wire == nullptr) return {0, 0, 0};
    const ibv::Mr* key = region.keys[plane];
    return {reinterpret_cast<uint64_t>(region.wire), region.region.bytes,
            side == Side::kLocal ? key->lkey : key->rkey};
}

int32_t Resources::num_signals() const {
    return int32_t(signals_in(regions[EPCOMM_FABRIC_SIGNALS].region.bytes));
}

bool Resources::has_atomics() const {
    return std::all_of(planes.begin(), planes.end(),
                       [](const auto& plane) { return plane->card().nic.atomics(); });
}

std::string Resources::describe() const {
    std::string text = "mlx5:";
    for (const auto& plane : planes) text += " " + plane->describe() + ";";
    text += " sl " + std::to_string(options.card.service_level) + " tc " +
            std::to_string(options.card.traffic_class) + ", regions:" + reports_of(regions);
    return text;
}

void open_cards(Resources* all, const std::vector<Region>& regions) {
    for (const Region& region : regions) {
        if (region.memory == Memory::kCuda) all->device = region.device;
    }
    VerbsOptions& options = all->options.card;
    if (options.pci.empty()) options.pci = gpu_of(regions);
    for (const NicName& name : choose_nics(sysfs(), list_mlx5_devices(), options)) {
        all->planes.push_back(std::make_unique<Plane>(name, all->options));
    }
}

void register_regions(Resources* all, const std::vector<Region>& regions) {
    const std::vector<Nic> nics = nics_of(*all);
    all->regions.resize(EPCOMM_FABRIC_MAX_REGIONS);
    try {
        for (const Region& region : regions) {
            all->regions[size_t(region.id)] =
                register_region(region, nics, all->options.card.registration, Copies::kRefused);
        }
    } catch (const std::runtime_error& error) {
        fail(Step::kRegions, names_of(nics), error.what());
    }
}

void make_queues(Resources* all) {
    const World& world = all->world;
    const auto num_planes = int32_t(all->planes.size());
    const auto most = uint32_t(world.num_nodes * world.num_channels);
    auto ringer = std::make_unique<Ringer>(all->device, most);
    for (int32_t p = 0; p < num_planes; ++p) {
        std::vector<Connection> connections;
        for (int32_t peer = 0; peer < world.num_nodes; ++peer) {
            for (int32_t channel = p; channel < world.num_channels; channel += num_planes) {
                if (peer == world.node) continue;
                const auto slot = uint32_t(connections.size());
                connections.push_back({peer, channel, slot, nullptr, nullptr});
            }
        }
        Plane& plane = *all->planes[size_t(p)];
        plane.make_room(all->device, std::move(connections), ringer.get());
        plane.make_queue_pairs(uint32_t(p) * most);
    }
    if (!ringer->empty()) all->ringer = std::move(ringer);
}

}  // namespace epcomm::fabric::devx
