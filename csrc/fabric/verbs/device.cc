// Finds network cards, chooses among them, and opens one.

#include "device.h"

#include <arpa/inet.h>
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <fstream>
#include <memory>
#include <stdexcept>

namespace epcomm::fabric {

namespace {

std::string join(const std::vector<std::string>& names) {
    std::string text;
    for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
    return text.empty() ? "none" : text;
}

std::string read_line(const std::string& path) {
    std::ifstream file(path);
    std::string line;
    std::getline(file, line);
    return line;
}

/// The folders of a device's place in the tree, from its root complex; empty if it has none.
std::vector<std::string> place_in_tree(const std::string& link) {
    char resolved[PATH_MAX];
    if (realpath(link.c_str(), resolved) == nullptr) return {};
    const char* start = strstr(resolved, "/pci");
    if (start == nullptr) return {};
    std::vector<std::string> folders;
    for (const char* at = start + 1; *at != 0;) {
        const char* end = strchrnul(at, '/');
        folders.emplace_back(at, end);
        at = *end == 0 ? end : end + 1;
    }
    return folders;
}

constexpr int32_t kOtherProcessor = 1000;
constexpr int32_t kNoPlace = 2000;

NicName parse_nic(const std::string& text) {
    const size_t colon = text.rfind(':');
    NicName name{text.substr(0, colon), 0};
    if (colon != std::string::npos) {
        name.port = atoi(text.c_str() + colon + 1);
        if (name.port <= 0 || name.port > 255) {
            throw std::runtime_error("option nic: expected device or device:port, got \"" + text +
                                     "\"");
        }
    }
    return name;
}

/// "A+B" as devices that exist.
std::vector<NicName> named(const std::vector<std::string>& texts,
                           const std::vector<std::string>& devices) {
    std::vector<NicName> names;
    for (const std::string& text : texts) {
        names.push_back(parse_nic(text));
        if (std::find(devices.begin(), devices.end(), names.back().device) == devices.end()) {
            throw std::runtime_error("option nic: there is no device \"" + names.back().device +
                                     "\" here; there are: " + join(devices));
        }
    }
    return names;
}

std::vector<std::string> split_plus(const std::string& text) {
    std::vector<std::string> parts{""};
    for (char c : text) {
        if (c == '+')
            parts.emplace_back();
        else
            parts.back() += c;
    }
    return parts;
}

bool is_zero(const ibv::Gid& gid) { return gid.words[0] == 0 && gid.words[1] == 0; }

/// Lower is better; negative: unusable.
int32_t rank_of_gid(const GidEntry& entry) {
    static const uint8_t mapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
    if (is_zero(entry.gid)) return -1;
    const bool ipv4 = memcmp(entry.gid.raw, mapped, sizeof mapped) == 0;
    const bool link_local = entry.gid.raw[0] == 0xfe && (entry.gid.raw[1] & 0xc0) == 0x80;
    return (entry.type == "RoCE v2" ? 0 : 3) + (ipv4 ? 0 : link_local ? 2 : 1);
}

std::string gid_to_text(const ibv::Gid& gid) {
    char text[INET6_ADDRSTRLEN];
    return inet_ntop(AF_INET6, gid.raw, text, sizeof text) != nullptr ? text : "?";
}

/// The port's table; with `only`, one entry of it.
std::vector<GidEntry> read_gids(const Nic& nic, int32_t only) {
    std::vector<GidEntry> entries;
    const std::string types = sysfs().root + "/class/infiniband/" + nic.name.device + "/ports/" +
                              std::to_string(nic.name.port) + "/gid_attrs/types/";
    for (int32_t i = 0; i < nic.port.gid_tbl_len; ++i) {
        if (only >= 0 && i != only) continue;
        GidEntry entry{i, {}, ""};
        if (ibv::library().query_gid(nic.context, uint8_t(nic.name.port), i, &entry.gid) != 0) {
            continue;
        }
        // An unused entry has no type, and asking for it is an error: skip what is empty.
        if (is_zero(entry.gid)) continue;
        entry.type = read_line(types + std::to_string(i));
        entries.push_back(entry);
    }
    return entries;
}

std::string label(const NicName& name) {
    return name.device + " port " + std::to_string(name.port);
}

void open_port(Nic* nic) {
    const auto query = [nic](int32_t port) {
        return ibv::library().query_port(nic->context, uint8_t(port), &nic->port) == 0;
    };
    if (nic->name.port != 0) {
        if (!query(nic->name.port)) {
            throw std::runtime_error("device " + nic->name.device + " has no port " +
                                     std::to_string(nic->name.port) + "; it has " +
                                     std::to_string(nic->device.phys_port_cnt));
        }
    } else {
        for (int32_t port = 1; port <= nic->device.phys_port_cnt; ++port) {
            nic->name.port = port;
            if (query(port) && nic->port.state == ibv::kPortActive) break;
        }
    }
    if (nic->port.state != ibv::kPortActive) {
        throw std::runtime_error("network port " + label(nic->name) +
                                 " is not active: check its cable, link and (InfiniBand) subnet "
                                 "manager, or name another with nic=");
    }
}

void find_gid(Nic* nic, const VerbsOptions& options) {
    const std::vector<GidEntry> entries = read_gids(*nic, options.gid);
    // On InfiniBand the first entry is the port's own and local identifiers do the routing.
    nic->gid_index = options.gid >= 0 ? options.gid : nic->ethernet() ? choose_gid(entries) : 0;
    const auto found = std::find_if(entries.begin(), entries.end(), [nic](const GidEntry& entry) {
        return entry.index == nic->gid_index;
    });
    if (found != entries.end()) {
        nic->gid = found->gid;
        nic->roce_v2 = nic->ethernet() && found->type == "RoCE v2";
        nic->gid_text = gid_to_text(found->gid) + (found->type.empty() ? "" : ", " + found->type);
    } else if (options.gid >= 0) {
        throw std::runtime_error("option gid: " + label(nic->name) + " has no address at index " +
                                 std::to_string(options.gid));
    } else if (nic->ethernet()) {
        throw std::runtime_error(label(nic->name) +
                                 " has no usable GID: give its network interface an IP address");
    }
}

/// Null, and errno says why: there is no such device, or `open` failed.
ibv::Context* open_by_name(const std::string& name, OpenDevice open) {
    int count = 0, error = ENODEV;
    std::unique_ptr<ibv::Device*, void (*)(ibv::Device**)> list(
        ibv::library().get_device_list(&count), ibv::library().free_device_list);
    ibv::Context* opened = nullptr;
    for (int i = 0; list != nullptr && i < count; ++i) {
        ibv::Device* device = list.get()[i];
        if (name != ibv::library().get_device_name(device)) continue;
        opened = open(device);
        error = errno;
    }
    list.reset();
    errno = error;
    return opened;
}

}  // namespace

int32_t pci_distance(const Sysfs& sysfs, const std::string& device, const std::string& pci) {
    const auto nic = place_in_tree(sysfs.root + "/class/infiniband/" + device + "/device");
    const auto gpu = place_in_tree(sysfs.root + "/bus/pci/devices/" + pci);
    if (pci.empty() || nic.empty() || gpu.empty()) return kNoPlace;
    size_t shared = 0;
    while (shared < nic.size() && shared < gpu.size() && nic[shared] == gpu[shared]) ++shared;
    const int32_t steps = int32_t(nic.size() + gpu.size() - 2 * shared);
    if (shared > 0) return steps;
    const auto processor = [&](const std::string& path) { return read_line(path + "/numa_node"); };
    const bool same = processor(sysfs.root + "/class/infiniband/" + device + "/device") ==
                      processor(sysfs.root + "/bus/pci/devices/" + pci);
    return same ? kOtherProcessor / 2 + steps : kOtherProcessor + steps;
}

std::vector<NicName> choose_nics(const Sysfs& sysfs, const std::vector<std::string>& devices,
                                 const VerbsOptions& options) {
    if (devices.empty()) {
        throw std::runtime_error(
            "there is no RDMA device here (/sys/class/infiniband): is the network card's driver "
            "loaded, and /dev/infiniband visible in this container?");
    }
    if (!options.nics.empty()) return named(options.nics, devices);
    if (!options.nic_map.empty()) {
        if (size_t(options.local_rank) >= options.nic_map.size()) {
            throw std::runtime_error(
                "option nic_map: it has " + std::to_string(options.nic_map.size()) +
                " entries, and this is local rank " + std::to_string(options.local_rank));
        }
        return named(split_plus(options.nic_map[size_t(options.local_rank)]), devices);
    }
    struct Candidate {
        int32_t distance;
        std::string device;
    };
    std::vector<Candidate> order;
    for (const std::string& device : devices) {
        order.push_back({pci_distance(sysfs, device, options.pci), device});
    }
    // By number, not by letter, so that every rank of a node counts alike: mlx5_2 before mlx5_10.
    std::sort(order.begin(), order.end(), [](const Candidate& a, const Candidate& b) {
        if (a.distance != b.distance) return a.distance < b.distance;
        if (a.device.size() != b.device.size()) return a.device.size() < b.device.size();
        return a.device < b.device;
    });
    // Within a group of the same distance, start at another card for every local rank.
    for (size_t begin = 0; begin < order.size();) {
        size_t end = begin;
        while (end < order.size() && order[end].distance == order[begin].distance) ++end;
        const size_t turn =
            size_t(options.local_rank) * size_t(options.nics_per_rank) % (end - begin);
        std::rotate(order.begin() + long(begin), order.begin() + long(begin + turn),
                    order.begin() + long(end));
        begin = end;
    }
    std::vector<NicName> names;
    for (size_t i = 0; i < order.size() && i < size_t(options.nics_per_rank); ++i) {
        names.push_back({order[i].device, 0});
    }
    return names;
}

int32_t choose_gid(const std::vector<GidEntry>& entries) {
    int32_t best = -1, best_rank = INT_MAX;
    for (const GidEntry& entry : entries) {
        const int32_t rank = rank_of_gid(entry);
        if (rank < 0 || rank >= best_rank) continue;
        best = entry.index;
        best_rank = rank;
    }
    return best;
}

std::string describe(const Nic& nic) {
    const std::string gid =
        nic.gid_text.empty() ? ""
                             : " GID " + std::to_string(nic.gid_index) + " (" + nic.gid_text + ")";
    return label(nic.name) + (nic.ethernet() ? " RoCE" : " InfiniBand") + gid + " MTU " +
           std::to_string(128 << nic.port.active_mtu);
}

std::vector<std::string> list_devices() {
    int count = 0;
    ibv::Device** list = ibv::library().get_device_list(&count);
    if (list == nullptr) return {};
    std::vector<std::string> names;
    for (int i = 0; i < count; ++i) names.emplace_back(ibv::library().get_device_name(list[i]));
    ibv::library().free_device_list(list);
    return names;
}

Nic open_nic(const NicName& name, const VerbsOptions& options, OpenDevice open) {
    const ibv::Library& verbs = ibv::library();
    if (open == nullptr) open = verbs.open_device;
    Nic nic;
    nic.name = name;
    nic.context = open_by_name(name.device, open);
    if (nic.context == nullptr) {
        throw std::runtime_error("device " + name.device + " cannot be opened (" + strerror(errno) +
                                 "): is /dev/infiniband/uverbs* readable and writable here?");
    }
    try {
        if (verbs.query_device(nic.context, &nic.device) != 0) {
            throw std::runtime_error("device " + name.device + " does not answer");
        }
        open_port(&nic);
        find_gid(&nic, options);
        nic.pd = verbs.alloc_pd(nic.context);
        if (nic.pd == nullptr) {
            throw std::runtime_error("device " + name.device + ": no protection domain (" +
                                     strerror(errno) + ")");
        }
    } catch (...) {
        close_nic(&nic);
        throw;
    }
    return nic;
}

void close_nic(Nic* nic) {
    if (nic->pd != nullptr) ibv::library().dealloc_pd(nic->pd);
    if (nic->context != nullptr) ibv::library().close_device(nic->context);
    nic->pd = nullptr;
    nic->context = nullptr;
}

}  // namespace epcomm::fabric
