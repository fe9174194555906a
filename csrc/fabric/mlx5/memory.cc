// Allocates memory for queues and registers it.

#include "memory.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include <stdexcept>

#include "../verbs/cuda_driver.h"
#include "../verbs/memory.h"
#include "step.h"

namespace epcomm::fabric::devx {

namespace {

/// What nvidia_peermem pins by, and a multiple of what a dma-buf consists of.
constexpr uint64_t kGpuPage = 64 << 10;
constexpr uint64_t kHostPage = 4 << 10;

uint64_t rounded(uint64_t bytes, uint64_t unit) { return (bytes + unit - 1) / unit * unit; }

/// When the process ends the driver may have gone first, and with it what was to be freed.
template <class Free>
void free_on(int32_t device, const Free& free) {
    try {
        const CudaContext context(device);
        free();
    } catch (const std::runtime_error&) {
    }
}

class GpuArena : public Arena {
 public:
    GpuArena(int32_t device, uint64_t bytes) : device_(device) {
        const CudaDriver& cuda = cuda_driver();
        const CudaContext context(device);
        const uint64_t size = rounded(bytes, kGpuPage);
        check_cuda(cuda.alloc(&allocated_, size + kGpuPage), "cuMemAlloc");
        start_ = reinterpret_cast<uint8_t*>(rounded(allocated_, kGpuPage));
        try {
            // Copies to memory that a card reads must have ended when they return.
            constexpr int kSyncMemops = 6;
            const int yes = 1;
            check_cuda(cuda.set_attribute(&yes, kSyncMemops, allocated_), "cuPointerSetAttribute");
            const std::vector<uint8_t> zeros(size);
            copy_in(0, zeros.data(), size);
        } catch (...) {
            cuda.free(allocated_);
            throw;
        }
    }
    ~GpuArena() override {
        free_on(device_, [this] { cuda_driver().free(allocated_); });
    }

    uint8_t* start() const override { return start_; }
    uint8_t* host() const override { return nullptr; }
    void write(uint64_t offset, const void* from, uint64_t bytes) override {
        const CudaContext context(device_);
        copy_in(offset, from, bytes);
    }
    void read(uint64_t offset, void* into, uint64_t bytes) const override {
        const CudaContext context(device_);
        const Stream stream;
        check_cuda(cuda_driver().to_host(into, address(offset), bytes, stream.get()),
                   "cuMemcpyDtoHAsync");
        check_cuda(cuda_driver().stream_wait(stream.get()), "cuStreamSynchronize");
    }

 private:
    /// A stream that waits for no other: the producers' kernels may be running.
    class Stream {
     public:
        Stream() {
            constexpr unsigned kNonBlocking = 1;
            check_cuda(cuda_driver().stream_create(&stream_, kNonBlocking), "cuStreamCreate");
        }
        ~Stream() { cuda_driver().stream_destroy(stream_); }
        void* get() const { return stream_; }

     private:
        void* stream_ = nullptr;
    };

    uint64_t address(uint64_t offset) const { return reinterpret_cast<uint64_t>(start_) + offset; }
    void copy_in(uint64_t offset, const void* from, uint64_t bytes) {
        const Stream stream;
        check_cuda(cuda_driver().to_device(address(offset), from, bytes, stream.get()),
                   "cuMemcpyHtoDAsync");
        check_cuda(cuda_driver().stream_wait(stream.get()), "cuStreamSynchronize");
    }

    int32_t device_;
    uint64_t allocated_ = 0;
    uint8_t* start_ = nullptr;
};

/// What both kinds of host memory share.
class HostArena : public Arena {
 public:
    uint8_t* host() const override { return host_; }
    void write(uint64_t offset, const void* from, uint64_t bytes) override {
        memcpy(host_ + offset, from, bytes);
    }
    void read(uint64_t offset, void* into, uint64_t bytes) const override {
        memcpy(into, host_ + offset, bytes);
    }

 protected:
    uint8_t* host_ = nullptr;
};

class PlainArena : public HostArena {
 public:
    explicit PlainArena(uint64_t bytes) : bytes_(rounded(bytes, kHostPage)) {
        void* memory =
            mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::runtime_error(strerror(errno));
        host_ = static_cast<uint8_t*>(memory);
    }
    ~PlainArena() override { munmap(host_, bytes_); }
    uint8_t* start() const override { return host_; }

 private:
    uint64_t bytes_;
};

class PinnedArena : public HostArena {
 public:
    PinnedArena(int32_t device, uint64_t bytes) : device_(device) {
        const CudaDriver& cuda = cuda_driver();
        const CudaContext context(device);
        const uint64_t size = rounded(bytes, kHostPage);
        constexpr unsigned kPortable = 1, kMapped = 2;
        void* memory = nullptr;
        check_cuda(cuda.host_alloc(&memory, size, kPortable | kMapped), "cuMemHostAlloc");
        host_ = static_cast<uint8_t*>(memory);
        memset(host_, 0, size);
        uint64_t mapped = 0;
        if (const int result = cuda.host_pointer(&mapped, host_, 0); result != 0) {
            cuda.host_free(host_);
            check_cuda(result, "cuMemHostGetDevicePointer");
        }
        start_ = reinterpret_cast<uint8_t*>(mapped);
    }
    ~PinnedArena() override {
        free_on(device_, [this] { cuda_driver().host_free(host_); });
    }
    uint8_t* start() const override { return start_; }

 private:
    int32_t device_;
    uint8_t* start_ = nullptr;
};

Umem* register_pointer(const Card& card, void* pointer, uint64_t bytes) {
    Umem* umem = library().devx_umem_reg(card.nic.context, pointer, bytes, ibv::kLocalWrite);
    if (umem == nullptr) throw std::runtime_error(strerror(errno));
    return umem;
}

Umem* register_dmabuf(const Card& card, int32_t device, void* pointer, uint64_t bytes) {
    if (library().devx_umem_reg_ex == nullptr) {
        throw std::runtime_error("libmlx5 lacks mlx5dv_devx_umem_reg_ex");
    }
    const Dmabuf file(device, pointer, bytes);
    UmemIn in{};
    in.addr = reinterpret_cast<void*>(file.offset());
    in.size = bytes;
    in.access = ibv::kLocalWrite;
    in.pgsz_bitmap = ~(kHostPage - 1);  // any size of pages that the card knows
    in.comp_mask = kUmemDmabuf;
    in.dmabuf_fd = file.fd();
    Umem* umem = library().devx_umem_reg_ex(card.nic.context, &in);
    if (umem == nullptr) throw std::runtime_error(strerror(errno));
    return umem;
}

}  // namespace

std::unique_ptr<Arena> make_gpu_arena(int32_t device, uint64_t bytes) {
    return std::make_unique<GpuArena>(device, bytes);
}

std::unique_ptr<Arena> make_host_arena(int32_t device, uint64_t bytes) {
    if (device < 0) return std::make_unique<PlainArena>(bytes);
    return std::make_unique<PinnedArena>(device, bytes);
}

std::unique_ptr<Arena> make_producer_arena(int32_t device, uint64_t bytes) {
    return device < 0 ? make_host_arena(device, bytes) : make_gpu_arena(device, bytes);
}

QueueMemory::QueueMemory(const Card& card, int32_t device, uint64_t bytes, QueuesIn wanted) {
    const bool gpu = device >= 0 && wanted != QueuesIn::kHost;
    const bool host = device < 0 || wanted != QueuesIn::kGpu;
    const uint64_t size = rounded(bytes, gpu ? kGpuPage : kHostPage);
    std::string refused;
    const auto attempt = [&](const char* way, const auto& registration) {
        try {
            umem_ = registration();
            report_ = way + (refused.empty() ? "" : " (" + refused + ")");
        } catch (const std::runtime_error& error) {
            refused += (refused.empty() ? "no " : "; no ") + std::string(way) + ": " + error.what();
        }
        return umem_ != nullptr;
    };
    const auto gpu_memory = [&]() -> Arena& {
        if (memory_ == nullptr) memory_ = make_gpu_arena(device, size);
        return *memory_;
    };
    if (gpu &&
        (attempt("dmabuf",
                 [&] { return register_dmabuf(card, device, gpu_memory().start(), size); }) ||
         attempt("peermem", [&] { return register_pointer(card, gpu_memory().start(), size); }))) {
        return;
    }
    memory_.reset();
    const auto register_host = [&] {
        memory_ = make_host_arena(device, size);
        return register_pointer(card, memory_->host(), size);
    };
    if (host && attempt("host", register_host)) return;
    memory_.reset();
    fail(Step::kQueueMemory, card.name(), refused);
}

QueueMemory::~QueueMemory() { library().devx_umem_dereg(umem_); }

}  // namespace epcomm::fabric::devx
