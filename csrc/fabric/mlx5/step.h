// The steps of the set-up by name. One that fails says what it was, why, and what to do about it.
#pragma once

#include <string>

namespace epcomm::fabric::devx {

/// X(enumerator, name, remedy) in the order of the set-up.
#define EPCOMM_DEVX_STEPS(X)                                                                       \
    X(kLibrary, "libmlx5", "install rdma-core 26 or newer (Debian: ibverbs-providers)")            \
    X(kDevice, "open with DEVX",                                                                   \
      "Linux 5.3 or newer is needed, and read and write access to /dev/infiniband/uverbs*; "       \
      "containers: --device /dev/infiniband --cap-add IPC_LOCK --cap-add NET_RAW")                 \
    X(kCapabilities, "capabilities", "update the card's firmware, or name another card with nic=") \
    X(kDomain, "protection domain", "look at the kernel's log (dmesg) for mlx5 errors")            \
    X(kRegions, "registering regions",                                                             \
      "for GPU memory the open GPU kernel modules (dma-buf) or 'modprobe nvidia_peermem' are "     \
      "needed, and for any memory enough of it locked (ulimit -l)")                                \
    X(kRegister, "doorbell register (UAR)",                                                        \
      "all of the card's are taken: end other processes that use it, or ask for fewer with "       \
      "registers=; containers: --cap-add NET_RAW")                                                 \
    X(kMapping, "mapping the doorbell into the GPU",                                               \
      "load the nvidia module with NVreg_RegistryDwords=\"PeerMappingOverride=1;\" "               \
      "(/proc/driver/nvidia/params shows it), or let a processor ring: doorbell=cpu")              \
    X(kQueueMemory, "queue memory",                                                                \
      "'modprobe nvidia_peermem', or queues=host; ulimit -l bounds what the host may lock")        \
    X(kProducerMemory, "memory for producers", "free memory of the GPU, or lockable of the host")  \
    X(kEventQueue, "event queue", "look at the kernel's log (dmesg) for mlx5 errors")              \
    X(kCompletionQueue, "completion queue",                                                        \
      "the card may have no more of them: fewer channels or depth=; the kernel's log (dmesg) "     \
      "explains the syndrome")                                                                     \
    X(kQueuePair, "queue pair",                                                                    \
      "the card may have no more of them: fewer channels or depth=; the kernel's log (dmesg) "     \
      "explains the syndrome")                                                                     \
    X(kInit, "queue pair to INIT", "check pkey= and the port in nic=")                             \
    X(kPath, "address of the peer",                                                                \
      "the peer's IP address cannot be resolved on this port: check its route and neighbour, "     \
      "or choose another address with gid=")                                                       \
    X(kReachPeer, "queue pair to RTR",                                                             \
      "check gid=, mtu= and that both cards are of one network (ibv_rc_pingpong between them)")    \
    X(kSend, "queue pair to RTS", "check timeout= and retries=")

enum class Step {
#define EPCOMM_DEVX_STEP(enumerator, name, remedy) enumerator,
    EPCOMM_DEVX_STEPS(EPCOMM_DEVX_STEP)
#undef EPCOMM_DEVX_STEP
};

const char* name_of(Step step);
const char* remedy_of(Step step);

/// Throws std::runtime_error: "ibgda: <step> failed on <where>: <why>; <remedy>".
[[noreturn]] void fail(Step step, const std::string& where, const std::string& why);

}  // namespace epcomm::fabric::devx
