// Memory of another process of this machine: a mapping of its memfd, opened through /proc.
//
// Nothing has a name in a file system, so nothing can be left behind and no two jobs can meet.
#pragma once

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <stdexcept>
#include <string>

namespace epcomm::fabric {

inline std::string system_text(const std::string& what) { return what + ": " + strerror(errno); }

/// What a peer is told about a piece of memory; plain data.
struct MemoryFile {
    int32_t pid;
    int32_t fd;
    uint64_t offset;
    uint64_t bytes;
    uint64_t inode;  ///< tells a reused descriptor from the one that was meant
};

/// Of this process. Throws std::runtime_error.
inline MemoryFile memory_file(int fd, uint64_t offset, uint64_t bytes) {
    struct stat file;
    if (fstat(fd, &file) != 0) throw std::runtime_error(system_text("fstat of a region"));
    return {int32_t(getpid()), fd, offset, bytes, uint64_t(file.st_ino)};
}

/// A mapping of a peer's memory; unmapped with the object.
class PeerMemory {
 public:
    PeerMemory() = default;
    PeerMemory(const PeerMemory&) = delete;
    PeerMemory& operator=(const PeerMemory&) = delete;
    PeerMemory(PeerMemory&& other) noexcept
        : base_(other.base_), mapped_(other.mapped_), start_(other.start_), bytes_(other.bytes_) {
        other.base_ = nullptr;
    }
    ~PeerMemory() {
        if (base_ != nullptr) munmap(base_, mapped_);
    }

    /// Throws std::runtime_error with a text that names `owner`, such as "node 3", and what to do.
    void map(const MemoryFile& file, const std::string& owner) {
        const std::string path =
            "/proc/" + std::to_string(file.pid) + "/fd/" + std::to_string(file.fd);
        const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
        if (fd < 0) {
            throw std::runtime_error(system_text("cannot open " + path + " of " + owner) +
                                     "; ranks that share memory must run as one user in one PID "
                                     "namespace of one machine");
        }
        const auto page = uint64_t(sysconf(_SC_PAGESIZE));
        const uint64_t skip = file.offset % page;
        mapped_ = size_t(file.bytes + skip);
        struct stat seen;
        const bool same = fstat(fd, &seen) == 0 && seen.st_ino == file.inode &&
                          uint64_t(seen.st_size) >= file.offset + file.bytes;
        void* base = MAP_FAILED;
        if (same) {
            base = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
                        off_t(file.offset - skip));
        }
        const std::string why = same ? system_text("cannot map " + path)
                                     : path + " is not the memory its rank registered";
        ::close(fd);
        if (base == MAP_FAILED) throw std::runtime_error(why);
        base_ = base;
        start_ = static_cast<uint8_t*>(base) + skip;
        bytes_ = file.bytes;
    }

    uint8_t* start() const { return start_; }
    uint64_t bytes() const { return bytes_; }

 private:
    void* base_ = nullptr;
    size_t mapped_ = 0;
    uint8_t* start_ = nullptr;
    uint64_t bytes_ = 0;
};

}  // namespace epcomm::fabric
