// Whether another process of this machine has ended.
#pragma once

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace epcomm::fabric {

/// Watches a process by a descriptor, which does not mistake a later process with its number for
/// it. Where the kernel has none, a peer's end is met by the deadline of whoever waits for it.
class PeerProcess {
 public:
    PeerProcess() = default;
    PeerProcess(const PeerProcess&) = delete;
    PeerProcess& operator=(const PeerProcess&) = delete;
    PeerProcess(PeerProcess&& other) noexcept : pidfd_(other.pidfd_) { other.pidfd_ = -1; }
    ~PeerProcess() {
        if (pidfd_ >= 0) close(pidfd_);
    }

    void watch(int pid) { pidfd_ = int(syscall(SYS_pidfd_open, pid, 0)); }

    bool gone() const {
        pollfd ended = {pidfd_, POLLIN, 0};
        return pidfd_ >= 0 && poll(&ended, 1, 0) > 0;
    }

 private:
    int pidfd_ = -1;
};

}  // namespace epcomm::fabric
