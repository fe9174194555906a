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

/// Whether a region may be reached through a copy in host memory, which proxies keep.
enum class Copies { kAllowed, kRefused };

/// Try the ways from the best to the last, or only the one that is asked for. A way counts only if
/// every card takes it. Throws std::runtime_error with what each said.
RegisteredRegion register_region(const Region& region, const std::vector<Nic>& nics,
                                 Registration wanted, Copies copies = Copies::kAllowed);

void unregister_region(RegisteredRegion* region);

/// The reports of those that are registered, a space before each; what follows its like is left
/// out.
std::string reports_of(const std::vector<RegisteredRegion>& regions);

/// Address of the GPU that the regions are on, such as 0000:1b:00.0; empty if all are the host's.
std::string gpu_of(const std::vector<Region>& regions);

/// GPU memory as a file that a network card's driver takes.
class Dmabuf {
 public:
    /// Throws std::runtime_error if the driver does not export it.
    Dmabuf(int32_t device, const void* pointer, uint64_t bytes);
    ~Dmabuf();
    Dmabuf(const Dmabuf&) = delete;
    Dmabuf& operator=(const Dmabuf&) = delete;
    int fd() const { return fd_; }
    /// Where in the file the memory starts: whole pages are exported.
    uint64_t offset() const { return offset_; }

 private:
    int fd_ = -1;
    uint64_t offset_ = 0;
};

/// Register host memory on one card; throws with the limits that may be the cause.
ibv::Mr* register_host_memory(const Nic& nic, void* pointer, uint64_t bytes);

}  // namespace epcomm::fabric
