// One fabric end of node 0 with a transport made by the test, and its memory.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

#include "../../csrc/fabric/fabric.h"
#include "../../csrc/fabric/transport.h"

struct EndOptions {
    int rings = 1;
    int threads = 1;
    int slots = 64;
    int channels = 4;
    int nodes = 2;
    int node = 0;
    int max_in_flight = 32;
    int64_t timeout_ns = 2'000'000'000;
    int64_t nap_ns = 20'000'000;
    bool device_fills = false;
    uint64_t region_bytes = 4096;  // more than there is, for transports that touch none
};

class TestEnd {
 public:
    /// `regions`: memory to register; none: some for the signals.
    explicit TestEnd(const char* transport, const EndOptions& options = {},
                     const std::vector<epcomm::fabric::Region>& regions = {}) {
        host.resize(size_t(epcomm_fabric_host_bytes(options.slots, options.rings)) / 8 + 16);
        producers.resize(size_t(epcomm_fabric_producer_bytes(options.rings)) / 8 + 16);
        region.resize(1024);
        epcomm_fabric_config config{};
        config.node = options.node;
        config.num_nodes = options.nodes;
        config.num_channels = options.channels;
        config.num_rings = options.rings;
        config.num_threads = options.threads;
        config.num_slots = options.slots;
        config.max_in_flight = options.max_in_flight;
        config.timeout_ns = options.timeout_ns;
        config.longest_nap_ns = options.nap_ns;
        config.device_fills = options.device_fills;
        config.host_memory = aligned(host);
        config.producer_memory = aligned(producers);
        end = epcomm_fabric_create(&config, transport, "");
        if (end == nullptr) return;
        if (regions.empty()) add_region(0, aligned(region), options.region_bytes);
        for (const auto& given : regions) add_region(given.id, given.pointer, given.bytes);
        epcomm_fabric_open(end);
        std::vector<const void*> addresses(size_t(options.nodes), "");
        std::vector<int64_t> sizes(size_t(options.nodes), 0);
        epcomm_fabric_connect(end, addresses.data(), sizes.data());
        fabric = epcomm_fabric_of(end);
    }

    ~TestEnd() {
        if (end == nullptr) return;
        if (epcomm_fabric_stop(end, 1'000'000'000) == 0) epcomm_fabric_destroy(end);
    }

    const epcomm_fabric_error& error() const { return fabric->state->error; }

    epcomm_fabric_end* end = nullptr;
    const epcomm_fabric* fabric = nullptr;

 private:
    void add_region(int32_t id, void* pointer, uint64_t bytes) {
        epcomm_fabric_region memory{};
        memory.id = id;
        memory.device = memory.fd = -1;
        memory.pointer = pointer;
        memory.bytes = bytes;
        epcomm_fabric_add_region(end, &memory);
    }

    static void* aligned(std::vector<uint64_t>& memory) {
        return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 127) / 128 *
                                       128);
    }

    std::vector<uint64_t> host, producers, region;
};
