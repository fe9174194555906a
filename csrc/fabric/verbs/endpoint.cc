// Endpoints of connections.

#include "endpoint.h"

#include <time.h>

#include <algorithm>

namespace epcomm::fabric {

namespace {

constexpr uint32_t kPsnMask = 0xffffff;

uint32_t draw_psn(uint32_t index) {
    // Different in each life of a queue pair number, so that a late packet of an earlier one is
    // not taken for one of this.
    timespec now{};
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint32_t(now.tv_nsec) * 2654435761u + index * 40503u) & kPsnMask;
}

}  // namespace

Endpoint make_endpoint(const Nic& nic, const VerbsOptions& options, uint32_t number,
                       uint32_t index) {
    Endpoint endpoint{};
    endpoint.number = number;
    endpoint.first_psn = draw_psn(index);
    endpoint.mtu = nic.port.active_mtu;
    for (uint32_t mtu = ibv::kMtu256; options.mtu > 0 && mtu <= ibv::kMtu4096; ++mtu) {
        if (128 << mtu <= options.mtu) endpoint.mtu = std::min<uint32_t>(nic.port.active_mtu, mtu);
    }
    endpoint.max_reads = uint32_t(std::min(nic.device.max_qp_rd_atom, kMaxReads));
    endpoint.gid = nic.gid;
    endpoint.lid = nic.port.lid;
    endpoint.ethernet = nic.ethernet();
    return endpoint;
}

ibv::AddressAttr make_path(const Nic& nic, const VerbsOptions& options, const Endpoint& remote) {
    ibv::AddressAttr path{};
    // Packets carry global addresses on Ethernet always, across InfiniBand subnets, and where the
    // subnet manager wants it.
    path.is_global = nic.ethernet() || (nic.port.flags & ibv::kPortNeedsGlobal) != 0 ||
                     remote.gid.words[0] != nic.gid.words[0];
    path.grh.dgid = remote.gid;
    path.grh.sgid_index = uint8_t(nic.gid_index);
    path.grh.hop_limit = 64;
    path.grh.traffic_class = uint8_t(options.traffic_class);
    path.dlid = remote.lid;
    path.sl = uint8_t(options.service_level);
    path.port_num = uint8_t(nic.name.port);
    return path;
}

void check_same_network(const Nic& nic, const Endpoint& remote, int32_t peer) {
    if ((remote.ethernet != 0) == nic.ethernet()) return;
    throw std::runtime_error(nic.name.device + " and the card of node " + std::to_string(peer) +
                             " are of different networks, InfiniBand and Ethernet");
}

}  // namespace epcomm::fabric
