// The transport `local-cuda`: ranks of virtual nodes on one machine, regions in GPU memory.
//
// A peer's regions are mapped by CUDA IPC. Every (peer, channel) has a stream; a put is a copy on
// it, by a copy engine where the driver lets us ask for one. Its signal is a second copy, of 8
// bytes, behind the first on the same stream: of the counter's new value, which this rank knows
// because nobody else raises that counter. So the value is stored, never added, and a repeated
// store could not count twice. An event behind the last copy of a batch tells when it has
// completed.
//
// The receiver's kernel may be running while the copies land. It relies on the order of a stream:
// a copy starts when the one before it has ended and its bytes are visible.

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <string.h>
#include <unistd.h>

#include <atomic>
#include <deque>
#include <stdexcept>
#include <unordered_map>

#include "atomics.h"
#include "peer_process.h"
#include "transport.h"

namespace epcomm::fabric {

namespace {

constexpr size_t kBatch = 16;  // operations of one event; fewer than a poll collects
constexpr int32_t kPeerGone = -1, kOutOfRange = -2;  // vendor codes that are no cudaError_t

struct Address {
    int32_t pid;
    int32_t node;
    struct Entry {
        int32_t registered;
        int32_t reserved;
        uint64_t offset;  ///< of the region in the allocation that the handle names
        uint64_t bytes;
        cudaIpcMemHandle_t handle;
    } regions[EPCOMM_FABRIC_MAX_REGIONS];
};

void require(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string("transport local-cuda: ") + what + ": " +
                             cudaGetErrorString(error));
}

/// Start of the allocation a device pointer lies in: an IPC handle names whole allocations. The
/// runtime has no such query, so the driver, which is loaded anyway, is asked.
uint64_t allocation_start(const void* pointer) {
    using Query = int (*)(unsigned long long*, size_t*, unsigned long long);
    void* driver = dlopen("libcuda.so.1", RTLD_NOW);
    const auto query = driver == nullptr
                           ? nullptr
                           : reinterpret_cast<Query>(dlsym(driver, "cuMemGetAddressRange_v2"));
    unsigned long long start = 0;
    size_t bytes = 0;
    if (query == nullptr || query(&start, &bytes, reinterpret_cast<uintptr_t>(pointer)) != 0) {
        throw std::runtime_error("transport local-cuda: a region is not device memory");
    }
    return start;
}

/// A copy between places of GPUs. By default a copy within one GPU runs on its SMs, where it
/// competes with the kernel that waits for it; copy engines are asked for where that is possible.
cudaError_t copy_device(void* to, const void* from, size_t bytes, cudaStream_t stream) {
#if CUDART_VERSION >= 13000
    static std::atomic<bool> possible{true};
    if (possible) {
        cudaMemcpyAttributes how{};
        how.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
        how.flags = cudaMemcpyFlagPreferOverlapWithCompute;
        size_t first = 0;
        const cudaError_t error =
            cudaMemcpyBatchAsync(&to, &from, &bytes, 1, &how, &first, 1, stream);
        if (error != cudaErrorNotSupported && error != cudaErrorCallRequiresNewerDriver) {
            return error;
        }
        cudaGetLastError();
        possible = false;
    }
#endif
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}

class LocalCuda : public Transport {
 public:
    ~LocalCuda() override { close(); }

    void add_region(const Region& region) override {
        if (region.memory != Memory::kCuda || (device_ >= 0 && region.device != device_)) {
            throw std::runtime_error("transport local-cuda: region " + std::to_string(region.id) +
                                     " must be memory of one and the same GPU");
        }
        device_ = region.device;
        require(cudaSetDevice(device_), "cudaSetDevice");
        Address::Entry& entry = mine_.regions[region.id];
        const uint64_t start = allocation_start(region.pointer);
        require(cudaIpcGetMemHandle(&entry.handle, reinterpret_cast<void*>(start)),
                "cudaIpcGetMemHandle; memory must come from cudaMalloc");
        entry.registered = 1;
        entry.offset = reinterpret_cast<uintptr_t>(region.pointer) - start;
        entry.bytes = region.bytes;
        local_[region.id] = static_cast<uint8_t*>(region.pointer);
    }

    void open(const Plan& plan) override {
        plan_ = plan;
        mine_.pid = int32_t(getpid());
        mine_.node = plan.node;
        peers_.resize(size_t(plan.num_nodes));
        lanes_.resize(size_t(plan.num_lanes));
        for (Lane& lane : lanes_) open_lane(&lane);
        streams_.resize(size_t(plan.num_nodes) * size_t(plan.num_channels));
    }

    std::string address(int32_t) override {
        return std::string(reinterpret_cast<const char*>(&mine_), sizeof mine_);
    }

    void connect(const std::vector<std::string>& addresses) override {
        require(cudaSetDevice(device_), "cudaSetDevice");
        for (int32_t n = 0; n < plan_.num_nodes; ++n) {
            if (n == plan_.node) continue;
            map_peer(n, addresses[size_t(n)]);
            for (int32_t c = 0; c < plan_.num_channels; ++c) open_stream(n, c);
        }
    }

    size_t post(int32_t number, const Operation* operations, size_t count) override {
        enter_thread();
        Lane& lane = lanes_[size_t(number)];
        size_t accepted = 0;
        for (; accepted < count && !lane.values_free.empty(); ++accepted) {
            const Operation& operation = operations[accepted];
            const int32_t code = start(&lane, operation);
            if (code != 0) lane.failed.push_back({operation.token, false, code, 0});
        }
        for (Batch& batch : lane.open) {
            require_or_fail(&lane, &batch, cudaEventRecord(batch.event, batch.stream));
            lane.under_way.push_back(std::move(batch));
        }
        lane.open.clear();
        return accepted;
    }

    size_t poll(int32_t number, Completion* completions, size_t capacity) override {
        enter_thread();
        Lane& lane = lanes_[size_t(number)];
        size_t count = 0;
        while (count < capacity && !lane.failed.empty()) {
            completions[count++] = lane.failed.back();
            lane.failed.pop_back();
        }
        for (size_t i = 0; i < lane.under_way.size();) {
            Batch& batch = lane.under_way[i];
            // Whole batches only, so that one is never half handed out.
            if (count + batch.operations.size() > capacity) break;
            const cudaError_t state = cudaEventQuery(batch.event);
            if (state == cudaErrorNotReady) {
                ++i;
                continue;
            }
            for (const Started& started : batch.operations) {
                completions[count++] = {started.token, state == cudaSuccess, int32_t(state), 0};
                lane.values_free.push_back(started.value);
            }
            lane.events_free.push_back(batch.event);
            lane.under_way.erase(lane.under_way.begin() + ptrdiff_t(i));
        }
        return count;
    }

    bool peer_gone(int32_t node) override { return peers_[size_t(node)].process.gone(); }

    std::string error_text(const Completion& completion) const override {
        if (completion.vendor == kPeerGone) return "the peer's process is gone";
        if (completion.vendor == kOutOfRange) {
            return "the place at the peer is not in a region it registered";
        }
        return cudaGetErrorString(cudaError_t(completion.vendor));
    }

    std::string describe() const override {
        return "local-cuda: CUDA IPC, copies of GPU " + std::to_string(device_) + " on " +
               std::to_string((plan_.num_nodes - 1) * plan_.num_channels) + " streams";
    }

    void close() override {
        if (peers_.empty()) return;
        cudaSetDevice(device_);
        wait_for_streams();
        for (cudaStream_t stream : streams_) {
            if (stream != nullptr) cudaStreamDestroy(stream);
        }
        for (Peer& peer : peers_) {
            for (void* base : peer.opened) cudaIpcCloseMemHandle(base);
        }
        for (Lane& lane : lanes_) {
            for (cudaEvent_t event : lane.events) cudaEventDestroy(event);
            cudaFreeHost(lane.values);
        }
        peers_.clear();
        lanes_.clear();
        streams_.clear();
    }

 private:
    struct Mapping {
        uint8_t* start = nullptr;
        uint64_t bytes = 0;
    };
    struct Peer {
        PeerProcess process;
        Mapping regions[EPCOMM_FABRIC_MAX_REGIONS];
        std::vector<void*> opened;
    };
    struct Started {
        uint64_t token;
        uint64_t* value;  ///< pinned: what its signal's copy reads
    };
    /// Operations of one stream up to one event.
    struct Batch {
        cudaStream_t stream;
        cudaEvent_t event;
        std::vector<Started> operations;
    };
    struct Lane {
        uint64_t* values = nullptr;  ///< pinned, one for each operation under way
        std::vector<uint64_t*> values_free;
        std::vector<cudaEvent_t> events, events_free;
        std::vector<Batch> open;  ///< of the post in progress
        std::deque<Batch> under_way;
        std::vector<Completion> failed;
        /// What this rank has raised a peer's signal to; a signal has one writing channel, so one
        /// lane.
        std::unordered_map<uint64_t, uint64_t> raised;
    };

    void open_lane(Lane* lane) {
        const auto count = size_t(plan_.max_in_flight);
        require(cudaHostAlloc(reinterpret_cast<void**>(&lane->values), count * sizeof(uint64_t),
                              cudaHostAllocPortable),
                "cudaHostAlloc");
        for (size_t i = 0; i < count; ++i) {
            cudaEvent_t event;
            require(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
            lane->values_free.push_back(lane->values + i);
            lane->events.push_back(event);
        }
        lane->events_free = lane->events;
    }

    cudaStream_t& stream_of(int32_t peer, int32_t channel) {
        return streams_[size_t(peer * plan_.num_channels + channel)];
    }

    void map_peer(int32_t node, const std::string& bytes) {
        Address address;
        if (bytes.size() != sizeof address) {
            throw std::runtime_error("transport local-cuda: node " + std::to_string(node) +
                                     " uses another transport or version");
        }
        memcpy(&address, bytes.data(), sizeof address);
        Peer& peer = peers_[size_t(node)];
        peer.process.watch(address.pid);
        for (int id = 0; id < EPCOMM_FABRIC_MAX_REGIONS; ++id) {
            const Address::Entry& entry = address.regions[id];
            if (entry.registered == 0) continue;
            void* base = nullptr;
            require(cudaIpcOpenMemHandle(&base, entry.handle, cudaIpcMemLazyEnablePeerAccess),
                    "cudaIpcOpenMemHandle; both ranks must be on one machine");
            peer.opened.push_back(base);
            peer.regions[id] = {static_cast<uint8_t*>(base) + entry.offset, entry.bytes};
        }
    }

    /// Make a stream and use it once for all that it will do: a first use may load code, which
    /// would wait for kernels that are running and wait for this copy.
    void open_stream(int32_t peer, int32_t channel) {
        cudaStream_t& stream = stream_of(peer, channel);
        require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
        uint8_t* scratch = nullptr;
        require(cudaMalloc(reinterpret_cast<void**>(&scratch), 2 * EPCOMM_FABRIC_UNIT),
                "cudaMalloc");
        const Mapping& theirs = peers_[size_t(peer)].regions[EPCOMM_FABRIC_SIGNALS];
        cudaError_t error = copy_device(scratch, theirs.start, EPCOMM_FABRIC_UNIT, stream);
        if (error == cudaSuccess) {
            error = cudaMemcpyAsync(scratch, lanes_[0].values, sizeof(uint64_t),
                                    cudaMemcpyHostToDevice, stream);
        }
        if (error == cudaSuccess) error = cudaEventRecord(lanes_[0].events[0], stream);
        if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
        cudaFree(scratch);
        require(error, "first use of a stream");
    }

    /// Once per thread: choose the device, and stay out of the way of stream captures elsewhere.
    void enter_thread() const {
        thread_local int32_t entered = -1;
        if (entered == device_) return;
        cudaSetDevice(device_);
        cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
        cudaThreadExchangeStreamCaptureMode(&mode);
        entered = device_;
    }

    /// Start an operation's copies. Returns 0 or a vendor code.
    int32_t start(Lane* lane, const Operation& operation) {
        const Command& command = operation.command;
        Peer& peer = peers_[size_t(command.peer)];
        if (peer.process.gone()) return kPeerGone;
        const cudaStream_t stream = stream_of(command.peer, command.channel);
        if (command.bytes != 0 && command.op != EPCOMM_FABRIC_SIGNAL_ADD) {
            const Mapping& remote = peer.regions[command.remote.region];
            if (command.remote.offset + command.bytes > remote.bytes) return kOutOfRange;
            const cudaError_t error = copy_device(
                remote.start + command.remote.offset,
                local_[command.local.region] + command.local.offset, command.bytes, stream);
            if (error != cudaSuccess) return int32_t(error);
        }
        uint64_t* value = lane->values_free.back();
        lane->values_free.pop_back();
        batch_of(lane, stream)->operations.push_back({operation.token, value});
        return command.op == EPCOMM_FABRIC_PUT ? 0 : signal(lane, command, stream, value);
    }

    int32_t signal(Lane* lane, const Command& command, cudaStream_t stream, uint64_t* value) {
        const Mapping& signals = peers_[size_t(command.peer)].regions[EPCOMM_FABRIC_SIGNALS];
        const uint64_t at = uint64_t(command.signal) * sizeof(uint64_t);
        if (at + sizeof(uint64_t) > signals.bytes) return kOutOfRange;
        uint64_t& raised = lane->raised[uint64_t(command.peer) << 32 | uint64_t(command.signal)];
        raised += command.op == EPCOMM_FABRIC_PUT_SIGNAL ? 1 : command.value;
        *value = raised;
        return int32_t(cudaMemcpyAsync(signals.start + at, value, sizeof(uint64_t),
                                       cudaMemcpyHostToDevice, stream));
    }

    static Batch* batch_of(Lane* lane, cudaStream_t stream) {
        for (Batch& batch : lane->open) {
            if (batch.stream == stream && batch.operations.size() < kBatch) return &batch;
        }
        // There are as many events as operations may be under way.
        lane->open.push_back({stream, lane->events_free.back(), {}});
        lane->events_free.pop_back();
        return &lane->open.back();
    }

    static void require_or_fail(Lane* lane, Batch* batch, cudaError_t error) {
        if (error == cudaSuccess) return;
        lane->failed.push_back({batch->operations[0].token, false, int32_t(error), 0});
    }

    void wait_for_streams() const {
        constexpr int64_t kLongestNs = 1'000'000'000;
        const int64_t start = now_ns();
        for (cudaStream_t stream : streams_) {
            while (stream != nullptr && cudaStreamQuery(stream) == cudaErrorNotReady &&
                   now_ns() - start < kLongestNs) {
                usleep(100);
            }
        }
    }

    Plan plan_{};
    Address mine_{};
    int32_t device_ = -1;
    uint8_t* local_[EPCOMM_FABRIC_MAX_REGIONS] = {};
    std::vector<Peer> peers_;
    std::vector<Lane> lanes_;
    std::vector<cudaStream_t> streams_;
};

const RegisterTransport kRegistered("local-cuda", []() -> std::unique_ptr<Transport> {
    return std::make_unique<LocalCuda>();
});

}  // namespace

}  // namespace epcomm::fabric
