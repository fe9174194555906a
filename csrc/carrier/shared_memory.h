// Host memory that a rank and its carrier share: a file without a name.
#pragma once

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <stdexcept>
#include <string>

namespace epcomm::carrier {

/// The rank's side: zeros.
class SharedMemory {
 public:
    explicit SharedMemory(uint64_t bytes) : bytes_(bytes) {
        fd_ = memfd_create("epcomm-carrier", MFD_CLOEXEC);
        if (fd_ >= 0 && ftruncate(fd_, int64_t(bytes)) == 0) {
            start_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
        }
        if (start_ != MAP_FAILED) return;
        const std::string why = strerror(errno);
        if (fd_ >= 0) close(fd_);
        throw std::runtime_error("memory to share with the carrier: " + why);
    }
    SharedMemory(const SharedMemory&) = delete;
    SharedMemory& operator=(const SharedMemory&) = delete;
    ~SharedMemory() {
        munmap(start_, bytes_);
        close(fd_);
    }
    int fd() const { return fd_; }
    void* start() const { return start_; }

 private:
    uint64_t bytes_;
    int fd_ = -1;
    void* start_ = MAP_FAILED;
};

/// The carrier's side.
class SharedMapping {
 public:
    SharedMapping(int fd, uint64_t bytes) : bytes_(bytes) {
        start_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (start_ == MAP_FAILED) {
            throw std::runtime_error(std::string("memory shared with the rank: ") +
                                     strerror(errno));
        }
    }
    SharedMapping(const SharedMapping&) = delete;
    SharedMapping& operator=(const SharedMapping&) = delete;
    ~SharedMapping() { munmap(start_, bytes_); }
    void* start() const { return start_; }

 private:
    void* start_;
    uint64_t bytes_;
};

}  // namespace epcomm::carrier
