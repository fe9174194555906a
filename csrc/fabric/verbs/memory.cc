// The registration ladder.

#include "memory.h"

#include <errno.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include <stdexcept>

#include "cuda_driver.h"

namespace epcomm::fabric {

namespace {

// No relaxed ordering: a signal must not become visible before the bytes written ahead of it.
int access_for(const Nic& nic) {
    return ibv::kLocalWrite | ibv::kRemoteWrite | ibv::kRemoteRead |
           (nic.atomics() ? int(ibv::kRemoteAtomic) : 0);
}

std::string memlock_limit() {
    rlimit limit{};
    if (getrlimit(RLIMIT_MEMLOCK, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY)
        return "unlimited";
    return std::to_string(limit.rlim_cur) + " bytes";
}

ibv::Mr* by_pointer(const Nic& nic, void* pointer, uint64_t bytes) {
    ibv::Mr* key = ibv::library().reg_mr(nic.pd, pointer, bytes, access_for(nic));
    if (key == nullptr) throw std::runtime_error(strerror(errno));
    return key;
}

ibv::Mr* by_dmabuf(const Nic& nic, const Region& region) {
    if (ibv::library().reg_dmabuf_mr == nullptr) {
        throw std::runtime_error("libibverbs is older than rdma-core 34");
    }
    const Dmabuf file(region.device, region.pointer, region.bytes);
    ibv::Mr* key = ibv::library().reg_dmabuf_mr(nic.pd, file.offset(), region.bytes,
                                                reinterpret_cast<uint64_t>(region.pointer),
                                                file.fd(), access_for(nic));
    if (key == nullptr) throw std::runtime_error(strerror(errno));
    return key;
}

const char* name_of(Registration how) {
    switch (how) {
        case Registration::kDmabuf: return "dmabuf";
        case Registration::kPeermem: return "peermem";
        case Registration::kBounce: return "bounce";
        case Registration::kAuto: break;
    }
    return "host";
}

ibv::Mr* key_on(const Nic& nic, const RegisteredRegion& registered) {
    switch (registered.how) {
        case Registration::kDmabuf: return by_dmabuf(nic, registered.region);
        case Registration::kPeermem:
            return by_pointer(nic, registered.region.pointer, registered.region.bytes);
        case Registration::kBounce:
        case Registration::kAuto: break;
    }
    return register_host_memory(nic, registered.wire, registered.region.bytes);
}

void release_keys(RegisteredRegion* registered) {
    for (ibv::Mr* key : registered->keys) ibv::library().dereg_mr(key);
    registered->keys.clear();
}

/// Throws what the first card that refuses says.
void try_way(Registration how, const std::vector<Nic>& nics, RegisteredRegion* registered) {
    registered->how = how;
    if (how == Registration::kBounce) registered->mirror = make_mirror(registered->region);
    registered->wire = registered->mirror != nullptr
                           ? registered->mirror->data()
                           : static_cast<uint8_t*>(registered->region.pointer);
    try {
        for (const Nic& nic : nics) registered->keys.push_back(key_on(nic, *registered));
    } catch (...) {
        release_keys(registered);
        registered->mirror.reset();
        throw;
    }
}

}  // namespace

std::string gpu_of(const std::vector<Region>& regions) {
    for (const Region& region : regions) {
        if (region.memory == Memory::kCuda) return gpu_address(region.device);
    }
    return "";
}

Dmabuf::Dmabuf(int32_t device, const void* pointer, uint64_t bytes) {
    const CudaContext context(device);
    // The driver exports whole pages of the host's size.
    const uint64_t page = uint64_t(sysconf(_SC_PAGESIZE));
    const uint64_t address = reinterpret_cast<uint64_t>(pointer);
    const uint64_t start = address / page * page;
    const uint64_t whole = (address - start + bytes + page - 1) / page * page;
    constexpr int kDmabufFd = 1;
    check_cuda(cuda_driver().export_range(&fd_, start, whole, kDmabufFd, 0),
               "cuMemGetHandleForAddressRange");
    offset_ = address - start;
}

Dmabuf::~Dmabuf() { close(fd_); }

ibv::Mr* register_host_memory(const Nic& nic, void* pointer, uint64_t bytes) {
    try {
        return by_pointer(nic, pointer, bytes);
    } catch (const std::runtime_error& error) {
        throw std::runtime_error(nic.name.device + " cannot register " + std::to_string(bytes) +
                                 " bytes of host memory (" + error.what() +
                                 "); the limit of locked memory is " + memlock_limit() +
                                 " (ulimit -l; containers: --ulimit memlock=-1)");
    }
}

RegisteredRegion register_region(const Region& region, const std::vector<Nic>& nics,
                                 Registration wanted, Copies copies) {
    const bool cuda = region.memory == Memory::kCuda;
    std::vector<Registration> ways;
    if (cuda)
        ways = {Registration::kDmabuf, Registration::kPeermem};
    else
        ways = {Registration::kAuto};
    if (cuda && copies == Copies::kAllowed) ways.push_back(Registration::kBounce);
    // Bounce may be asked for anywhere; what is only for devices does not concern host memory.
    if (wanted == Registration::kBounce || (cuda && wanted != Registration::kAuto)) ways = {wanted};
    RegisteredRegion registered;
    registered.region = region;
    std::string refused;
    for (Registration how : ways) {
        try {
            try_way(how, nics, &registered);
            registered.report = name_of(how) + (refused.empty() ? "" : " (" + refused + ")");
            return registered;
        } catch (const std::runtime_error& error) {
            refused += (refused.empty() ? "no " : "; no ") + std::string(name_of(how)) + ": " +
                       error.what();
        }
    }
    throw std::runtime_error("region " + std::to_string(region.id) + " of " +
                             std::to_string(region.bytes) +
                             " bytes cannot be registered: " + refused);
}

void unregister_region(RegisteredRegion* region) {
    release_keys(region);
    region->mirror.reset();
}

std::string reports_of(const std::vector<RegisteredRegion>& regions) {
    std::string text, before;
    for (const RegisteredRegion& region : regions) {
        if (region.wire == nullptr || region.report == before) continue;
        text += " " + region.report;
        before = region.report;
    }
    return text;
}

}  // namespace epcomm::fabric
