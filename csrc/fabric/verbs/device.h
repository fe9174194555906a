// Network cards: which exist, which are near a GPU, and what a chosen one can do.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

#include "library.h"
#include "options.h"

namespace epcomm::fabric {

/// Where the kernel describes devices; another folder in tests.
struct Sysfs {
    std::string root = "/sys";
};

/// This machine's; beside the libraries the one thing outside that a test puts another in place of.
const Sysfs& sysfs();

/// A port of a device, as named by an option: "mlx5_0" or "mlx5_0:2"; 0 = the first active one.
struct NicName {
    std::string device;
    int32_t port = 0;
};

/// Steps between a network card and a GPU in the tree of PCI devices; more than any tree has when
/// they hang on different processors, and more again when one of them is no PCI device.
int32_t pci_distance(const Sysfs& sysfs, const std::string& device, const std::string& pci);

/// The cards of a rank, of `devices`: `nic`, else the rank's part of `nic_map`, else the nearest to
/// its GPU. Ranks that are equally near to several take them in turn by local rank.
/// Throws std::runtime_error when a named device does not exist, or there is none.
std::vector<NicName> choose_nics(const Sysfs& sysfs, const std::vector<std::string>& devices,
                                 const VerbsOptions& options);

/// An entry of a port's table of addresses.
struct GidEntry {
    int32_t index;
    ibv::Gid gid;
    std::string type;  ///< "IB/RoCE v1" or "RoCE v2"; empty where the kernel does not say
};

/// The entry to use on Ethernet: RoCE v2 before v1, an IPv4 address before a routable IPv6 one
/// before a link-local one. -1: none is usable.
int32_t choose_gid(const std::vector<GidEntry>& entries);

/// An opened device, its port and its address there.
struct Nic {
    NicName name;
    ibv::Context* context = nullptr;
    ibv::Pd* pd = nullptr;
    ibv::DeviceAttr device{};
    ibv::PortAttr port{};
    int32_t gid_index = 0;
    ibv::Gid gid{};
    std::string gid_text;
    bool roce_v2 = false;  ///< packets to and from this address are UDP

    bool ethernet() const { return port.link_layer == ibv::kLinkEthernet; }
    /// As requester and as responder.
    bool atomics() const {
        return device.atomic_cap != ibv::kAtomicNone && device.max_qp_rd_atom > 0 &&
               device.max_qp_init_rd_atom > 0;
    }
};

/// The card, its port and its address in words.
std::string describe(const Nic& nic);

/// Names of the devices that libibverbs has a driver for.
std::vector<std::string> list_devices();

/// Opens a device; null with errno set if that fails.
using OpenDevice = ibv::Context* (*)(ibv::Device*);

/// Throws std::runtime_error naming the device, the port or the GID index that does not work.
/// `open`: how; null means ibv_open_device.
Nic open_nic(const NicName& name, const VerbsOptions& options, OpenDevice open = nullptr);

void close_nic(Nic* nic);

}  // namespace epcomm::fabric
