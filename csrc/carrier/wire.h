// What a rank and its carrier say to each other over their socket.
#pragma once

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace epcomm::carrier {

/// Descriptor that the carrier finds its socket at.
constexpr int kSocket = 3;
constexpr size_t kMaxDescriptors = 16;

enum Word : uint8_t {
    kEnd = 'e',    ///< rank: end the session
    kReady = 'r',  ///< carrier: the job works
    kDone = 'd',   ///< carrier: the session has ended, another may begin
    kFailed = 'f'  ///< carrier: a text follows, and the end
};

/// Starts a session; then the job's name and the setup. The descriptors come with the first byte.
struct Hello {
    uint32_t job_bytes;
    uint32_t num_fds;
    uint64_t setup_bytes;
};

inline std::runtime_error broken(const char* what) {
    return std::runtime_error(std::string("carrier: ") + what + ": " +
                              (errno == 0 ? "the other side is gone" : strerror(errno)));
}

inline void send_all(int socket, const void* from, size_t bytes) {
    const auto* at = static_cast<const uint8_t*>(from);
    while (bytes != 0) {
        const ssize_t sent = send(socket, at, bytes, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) continue;
        if (sent <= 0) throw broken("sending");
        at += sent;
        bytes -= size_t(sent);
    }
}

inline void send_word(int socket, Word word) { send_all(socket, &word, 1); }

/// Wait until there is something to read. False: `timeout_ms` passed.
inline bool wait_readable(int socket, int timeout_ms) {
    pollfd entry = {socket, POLLIN, 0};
    int found = 0;
    do {
        found = poll(&entry, 1, timeout_ms);
    } while (found < 0 && errno == EINTR);
    return found > 0;
}

inline void receive_all(int socket, void* into, size_t bytes) {
    auto* at = static_cast<uint8_t*>(into);
    while (bytes != 0) {
        const ssize_t got = recv(socket, at, bytes, 0);
        if (got < 0 && errno == EINTR) continue;
        if (got == 0) errno = 0;
        if (got <= 0) throw broken("receiving");
        at += got;
        bytes -= size_t(got);
    }
}

inline std::string receive_text(int socket, size_t bytes) {
    std::string text(bytes, 0);
    receive_all(socket, &text[0], bytes);
    return text;
}

/// Room for the descriptors of a Hello, aligned as the kernel wants it.
union Ancillary {
    char bytes[CMSG_SPACE(kMaxDescriptors * sizeof(int))];
    cmsghdr align;
};

inline void send_hello(int socket, Hello hello, const std::vector<int>& fds) {
    Ancillary ancillary = {};
    iovec part = {&hello, sizeof hello};
    msghdr message = {};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    if (!fds.empty()) {
        message.msg_control = ancillary.bytes;
        message.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
        cmsghdr* header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
        memcpy(CMSG_DATA(header), fds.data(), fds.size() * sizeof(int));
    }
    // A header of so few bytes is never sent in part.
    if (sendmsg(socket, &message, MSG_NOSIGNAL) != ssize_t(sizeof hello)) throw broken("sending");
}

/// False: the rank is gone.
inline bool receive_hello(int socket, Hello* hello, std::vector<int>* fds) {
    Ancillary ancillary = {};
    iovec part = {hello, sizeof *hello};
    msghdr message = {};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = ancillary.bytes;
    message.msg_controllen = sizeof ancillary.bytes;
    ssize_t got = 0;
    do {
        got = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
    } while (got < 0 && errno == EINTR);
    if (got != ssize_t(sizeof *hello)) return false;
    for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr;
         header = CMSG_NXTHDR(&message, header)) {
        if (header->cmsg_type != SCM_RIGHTS) continue;
        fds->resize((header->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(fds->data(), CMSG_DATA(header), fds->size() * sizeof(int));
    }
    return fds->size() == hello->num_fds;
}

}  // namespace epcomm::carrier
