// Mirrors of host memory and of a GPU's.

#include "mirror.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include <mutex>
#include <stdexcept>
#include <string>

#include "cuda_driver.h"

namespace epcomm::fabric {

namespace {

class HostMirror : public Mirror {
 public:
    explicit HostMirror(const Region& region)
        : region_(static_cast<uint8_t*>(region.pointer)), bytes_(region.bytes) {
        void* memory =
            mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) {
            throw std::runtime_error("no memory for a copy of region " + std::to_string(region.id) +
                                     " (" + std::to_string(bytes_) + " bytes): " + strerror(errno));
        }
        memory_ = static_cast<uint8_t*>(memory);
    }
    ~HostMirror() override { munmap(memory_, bytes_); }

    uint8_t* data() override { return memory_; }
    bool fetch(uint64_t offset, uint64_t bytes) override {
        memcpy(memory_ + offset, region_ + offset, bytes);
        return true;
    }
    bool store(uint64_t offset, uint64_t bytes) override {
        memcpy(region_ + offset, memory_ + offset, bytes);
        return true;
    }
    bool store_word(uint64_t offset, uint64_t value) override {
        __atomic_store_n(reinterpret_cast<uint64_t*>(region_ + offset), value, __ATOMIC_RELEASE);
        return true;
    }

 private:
    uint8_t* region_;
    uint64_t bytes_;
    uint8_t* memory_ = nullptr;
};

/// Copies by the GPU's copy engines on a stream of its own that never waits for another: a kernel
/// that waits for these very bytes may be running.
class CudaMirror : public Mirror {
 public:
    explicit CudaMirror(const Region& region)
        : device_(region.device), region_(reinterpret_cast<uint64_t>(region.pointer)) {
        const CudaDriver& cuda = cuda_driver();
        const CudaContext context(device_);
        constexpr unsigned kPortable = 1, kNonBlocking = 1;
        void* memory = nullptr;
        check_cuda(cuda.stream_create(&stream_, kNonBlocking), "cuStreamCreate");
        // One word more than the region, for store_word.
        const int result = cuda.host_alloc(&memory, region.bytes + sizeof(uint64_t), kPortable);
        if (result != 0) cuda.stream_destroy(stream_);
        check_cuda(result, "cuMemHostAlloc");
        memory_ = static_cast<uint8_t*>(memory);
        word_ = memory_ + region.bytes;
    }
    ~CudaMirror() override {
        const CudaContext context(device_);
        cuda_driver().stream_wait(stream_);
        cuda_driver().stream_destroy(stream_);
        cuda_driver().host_free(memory_);
    }

    uint8_t* data() override { return memory_; }
    bool fetch(uint64_t offset, uint64_t bytes) override {
        return copy([&](const CudaDriver& cuda) {
            return cuda.to_host(memory_ + offset, region_ + offset, bytes, stream_);
        });
    }
    bool store(uint64_t offset, uint64_t bytes) override {
        return copy([&](const CudaDriver& cuda) {
            return cuda.to_device(region_ + offset, memory_ + offset, bytes, stream_);
        });
    }
    bool store_word(uint64_t offset, uint64_t value) override {
        return copy([&](const CudaDriver& cuda) {
            memcpy(word_, &value, sizeof value);
            return cuda.to_device(region_ + offset, word_, sizeof value, stream_);
        });
    }

 private:
    // Lanes share the stream and the word. Every copy is waited for, so that a word is copied only
    // after the bytes that it announces are there.
    template <class Start>
    bool copy(const Start& start) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const CudaDriver& cuda = cuda_driver();
        const CudaContext context(device_);
        return start(cuda) == 0 && cuda.stream_wait(stream_) == 0;
    }

    std::mutex mutex_;
    int32_t device_;
    uint64_t region_;
    void* stream_ = nullptr;
    uint8_t* memory_ = nullptr;
    uint8_t* word_ = nullptr;
};

}  // namespace

std::unique_ptr<Mirror> make_mirror(const Region& region) {
    if (region.memory == Memory::kCuda) return std::make_unique<CudaMirror>(region);
    return std::make_unique<HostMirror>(region);
}

}  // namespace epcomm::fabric
