// All that a rank has to give back, and how it is made: cards, regions, queues.
#pragma once

#include "../verbs/memory.h"
#include "plane.h"

namespace epcomm::fabric::devx {

struct World {
    int32_t node;
    int32_t num_nodes;
    int32_t num_channels;
};

/// Which of a region's keys.
enum class Side { kLocal, kRemote };

struct Resources {
    Options options;
    World world{};
    int32_t device = -1;  ///< the GPU that producers run on; -1: the host
    std::vector<std::unique_ptr<Plane>> planes;
    std::vector<RegisteredRegion> regions;  ///< by id
    std::unique_ptr<Arena> tables;          ///< what producers are given
    std::unique_ptr<Ringer> ringer;         ///< null: nobody needs one

    Resources() = default;
    ~Resources();
    Resources(const Resources&) = delete;
    Resources& operator=(const Resources&) = delete;

    /// A region as the card of a plane knows it; zeros if there is none.
    epcomm_region_key key(size_t plane, int32_t id, Side side) const;
    /// Signals of a rank: words of region 0 but the last.
    int32_t num_signals() const;
    /// Of every card.
    bool has_atomics() const;
    std::string describe() const;
};

// The steps, in this order. They throw std::runtime_error naming what failed.

void open_cards(Resources* all, const std::vector<Region>& regions);
void register_regions(Resources* all, const std::vector<Region>& regions);
void make_queues(Resources* all);

}  // namespace epcomm::fabric::devx
