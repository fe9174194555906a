// Regions made reachable for network cards: the ladder dma-buf, peer memory, pinned host memory.
#pragma once

#include <stdint.h>

#include <memory>
#include <string>
#include <vector>

#include "device.h"
#include "mirror.h"

namespace epcomm::fabric {

struct RegisteredRegion {
    Region region;
    /// kAuto means: host memory, registered as it is.
    Registration how = Registration::kAuto;
    /// What network cards read and write: the region, or its mirror.
    uint8_t* wire = nullptr;
    std::vector<ibv::Mr*> keys;  ///< one per network card
    std::unique_ptr<Mirror> mirror;
    /// What was chosen and why not the better ones, for the log.
    std::string report;
};

/// Try the ways from the best to the last, or only the one that is asked for. A way counts only if
/// every card takes it. Throws std::runtime_error with what each said.
RegisteredRegion register_region(const Region& region, const std::vector<Nic>& nics,
                                 Registration wanted);

void unregister_region(RegisteredRegion* region);

/// Register host memory on one card; throws with the limits that may be the cause.
ibv::Mr* register_host_memory(const Nic& nic, void* pointer, uint64_t bytes);

}  // namespace epcomm::fabric
