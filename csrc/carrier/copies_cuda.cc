// The job `copies`: copies between GPU memory of the ranks of virtual nodes, with their signals.
//
// Every (peer, channel) has a stream; a put is a copy on it, by a copy engine where the driver lets
// us ask for one. Its signal is a store by the stream, behind the copy: of the counter's new value,
// which this process knows because nobody else raises that counter. So the value is stored, never
// added, and a repeated store could not count twice. An event behind the last operation of a batch
// tells when it has completed.
//
// The receiver's kernel may be running while the copies land. It relies on the order of a stream:
// the store comes when the copy has ended, behind a barrier of system scope that the driver puts
// before it.

#include <dlfcn.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <deque>
#include <stdexcept>
#include <unordered_map>

#include "carrier.h"
#include "copies.h"
#include "shared_memory.h"

namespace epcomm::carrier {

namespace {

using fabric::Command;
using fabric::Completion;
using fabric::Operation;

constexpr size_t kBatch = 16;           ///< operations of one event
constexpr int64_t kSpinNs = 200'000;    ///< without work, before the first nap
constexpr int64_t kNapNs = 50'000'000;  ///< until the session is looked at again

/// A copy between places of GPUs. By default a copy within one GPU runs on its SMs, where it
/// competes with the kernel that waits for it; copy engines are asked for where that is possible.
cudaError_t copy_device(void* to, const void* from, size_t bytes, cudaStream_t stream) {
#if CUDART_VERSION >= 13000
    static bool possible = true;
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

/// The driver's store in order of a stream, which the runtime does not have.
class StreamStore {
 public:
    StreamStore() {
        void* driver = dlopen("libcuda.so.1", RTLD_NOW);
        store_ = driver == nullptr
                     ? nullptr
                     : reinterpret_cast<Store>(dlsym(driver, "cuStreamWriteValue64_v2"));
        if (store_ == nullptr) {
            throw std::runtime_error(
                "transport local-cuda: the driver has no stream memory "
                "operations; install one of CUDA 12 or newer");
        }
    }

    /// Returns 0 or a code that is a cudaError_t's too.
    int operator()(cudaStream_t stream, uint64_t* address, uint64_t value) const {
        return store_(stream, reinterpret_cast<uintptr_t>(address), value, 0);
    }

 private:
    using Store = int (*)(cudaStream_t, unsigned long long, uint64_t, unsigned);
    Store store_;
};

/// The regions of a rank, as this process reaches them.
class Regions {
 public:
    struct Mapping {
        uint8_t* start = nullptr;
        uint64_t bytes = 0;
    };

    void open(const CopyAddress& address) {
        for (int id = 0; id < EPCOMM_FABRIC_MAX_REGIONS; ++id) {
            regions_[id] = {memory_.open(address.regions[id]), address.regions[id].bytes};
        }
    }

    const Mapping& operator[](int32_t id) const { return regions_[id]; }

 private:
    IpcMappings memory_;
    Mapping regions_[EPCOMM_FABRIC_MAX_REGIONS];
};

/// Operations of one stream up to one event.
struct Batch {
    cudaStream_t stream;
    cudaEvent_t event;
    std::vector<uint64_t> tokens;
};

/// One lane's operations: from its ring to streams, and back to its ring of completions.
struct Lane {
    CopyLane* shared;
    uint64_t taken = 0;
    std::vector<cudaEvent_t> events, events_free;
    std::vector<Batch> open;  ///< of the round in progress
    std::deque<Batch> under_way;
    std::vector<Completion> done;
    /// What the rank has raised a peer's signal to; a signal has one writing channel, so one lane.
    std::unordered_map<uint64_t, uint64_t> raised;
};

class Copies {
 public:
    Copies(const std::string& setup, void* memory)
        : setup_(*reinterpret_cast<const CopySetup*>(setup.data())),
          memory_(memory, setup_.num_slots) {
        require(cudaSetDevice(setup_.device), "cudaSetDevice");
        const auto* addresses =
            reinterpret_cast<const CopyAddress*>(setup.data() + sizeof(CopySetup));
        regions_ = std::vector<Regions>(size_t(setup_.num_nodes));
        for (int32_t n = 0; n < setup_.num_nodes; ++n) regions_[size_t(n)].open(addresses[n]);
        lanes_.resize(size_t(setup_.num_lanes));
        for (int32_t i = 0; i < setup_.num_lanes; ++i) open_lane(i);
        streams_.resize(size_t(setup_.num_nodes) * size_t(setup_.num_channels));
        for (int32_t n = 0; n < setup_.num_nodes; ++n) {
            for (int32_t c = 0; n != setup_.node && c < setup_.num_channels; ++c) {
                open_stream(n, c);
            }
        }
    }

    ~Copies() {
        wait_for_streams();
        for (cudaStream_t stream : streams_) {
            if (stream != nullptr) cudaStreamDestroy(stream);
        }
        for (Lane& lane : lanes_) {
            for (cudaEvent_t event : lane.events) cudaEventDestroy(event);
        }
    }

    /// Start what was handed over and hand back what has completed. Whether there was any.
    bool step() {
        bool worked = false;
        for (Lane& lane : lanes_) {
            worked = take(&lane) || worked;
            collect(&lane);
            worked = hand_back(&lane) || worked;
        }
        return worked;
    }

    bool busy() const {
        for (const Lane& lane : lanes_) {
            if (!lane.under_way.empty()) return true;
        }
        return false;
    }

    /// Sleep until an operation is handed over, or for a while.
    void nap() {
        // The rank publishes, then looks whether the carrier sleeps; the carrier says so, then
        // looks for work. All four in one order: one of the two sees the other.
        __atomic_store_n(memory_.asleep(), 1u, __ATOMIC_SEQ_CST);
        bool work = false;
        for (Lane& lane : lanes_) {
            work = work || __atomic_load_n(&lane.shared->posted, __ATOMIC_SEQ_CST) != lane.taken;
        }
        if (!work) {
            const timespec duration = {0, kNapNs};
            syscall(SYS_futex, memory_.asleep(), FUTEX_WAIT, 1, &duration, nullptr, 0);
        }
        __atomic_store_n(memory_.asleep(), 0u, __ATOMIC_SEQ_CST);
    }

 private:
    void open_lane(int32_t number) {
        Lane& lane = lanes_[size_t(number)];
        lane.shared = memory_.lane(number);
        const size_t count = setup_.num_slots;
        for (size_t i = 0; i < count; ++i) {
            cudaEvent_t event;
            require(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
            lane.events.push_back(event);
        }
        lane.events_free = lane.events;
    }

    cudaStream_t& stream_of(int32_t peer, int32_t channel) {
        return streams_[size_t(peer * setup_.num_channels + channel)];
    }

    /// Make a stream and use it once for all that it will do: a first use may load code, which
    /// would wait for kernels that are running and wait for this copy.
    void open_stream(int32_t peer, int32_t channel) {
        cudaStream_t& stream = stream_of(peer, channel);
        require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
        uint8_t* scratch = nullptr;
        require(cudaMalloc(reinterpret_cast<void**>(&scratch), 2 * EPCOMM_FABRIC_UNIT),
                "cudaMalloc");
        const auto& theirs = regions_[size_t(peer)][EPCOMM_FABRIC_SIGNALS];
        cudaError_t error = copy_device(scratch, theirs.start, EPCOMM_FABRIC_UNIT, stream);
        if (error == cudaSuccess) {
            error = cudaError_t(store_(stream, reinterpret_cast<uint64_t*>(scratch), 0));
        }
        if (error == cudaSuccess) error = cudaEventRecord(lanes_[0].events[0], stream);
        if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
        cudaFree(scratch);
        require(error, "first use of a stream");
    }

    bool take(Lane* lane) {
        const uint64_t posted = fabric::load_acquire(&lane->shared->posted);
        if (posted == lane->taken) return false;
        for (; lane->taken != posted; ++lane->taken) {
            const Operation& operation = *memory_.operation(lane->shared, lane->taken);
            const int32_t code = start(lane, operation);
            if (code != 0) lane->done.push_back({operation.token, false, code, 0});
        }
        for (Batch& batch : lane->open) {
            const cudaError_t error = cudaEventRecord(batch.event, batch.stream);
            if (error != cudaSuccess) {
                lane->done.push_back({batch.tokens[0], false, vendor_code(error), 0});
            }
            lane->under_way.push_back(std::move(batch));
        }
        lane->open.clear();
        return true;
    }

    /// Start an operation's copies. Returns 0 or a vendor code.
    int32_t start(Lane* lane, const Operation& operation) {
        const Command& command = operation.command;
        const Regions& theirs = regions_[size_t(command.peer)];
        const cudaStream_t stream = stream_of(command.peer, command.channel);
        if (command.bytes != 0 && command.op != EPCOMM_FABRIC_SIGNAL_ADD) {
            const auto& remote = theirs[command.remote.region];
            if (command.remote.offset + command.bytes > remote.bytes) return fabric::kOutOfRange;
            const auto& local = regions_[size_t(setup_.node)][command.local.region];
            const cudaError_t error =
                copy_device(remote.start + command.remote.offset,
                            local.start + command.local.offset, command.bytes, stream);
            if (error != cudaSuccess) return vendor_code(error);
        }
        batch_of(lane, stream)->tokens.push_back(operation.token);
        if (command.op == EPCOMM_FABRIC_PUT) return 0;
        return signal(lane, command, theirs[EPCOMM_FABRIC_SIGNALS], stream);
    }

    int32_t signal(Lane* lane, const Command& command, const Regions::Mapping& signals,
                   cudaStream_t stream) const {
        const uint64_t at = uint64_t(command.signal) * sizeof(uint64_t);
        if (at + sizeof(uint64_t) > signals.bytes) return fabric::kOutOfRange;
        uint64_t& raised = lane->raised[uint64_t(command.peer) << 32 | uint64_t(command.signal)];
        raised += command.op == EPCOMM_FABRIC_PUT_SIGNAL ? 1 : command.value;
        return vendor_code(store_(stream, reinterpret_cast<uint64_t*>(signals.start + at), raised));
    }

    static Batch* batch_of(Lane* lane, cudaStream_t stream) {
        for (Batch& batch : lane->open) {
            if (batch.stream == stream && batch.tokens.size() < kBatch) return &batch;
        }
        // There are as many events as operations may be under way.
        lane->open.push_back({stream, lane->events_free.back(), {}});
        lane->events_free.pop_back();
        return &lane->open.back();
    }

    static void collect(Lane* lane) {
        for (size_t i = 0; i < lane->under_way.size();) {
            Batch& batch = lane->under_way[i];
            const cudaError_t state = cudaEventQuery(batch.event);
            if (state == cudaErrorNotReady) {
                ++i;
                continue;
            }
            for (const uint64_t token : batch.tokens) {
                lane->done.push_back({token, state == cudaSuccess, vendor_code(state), 0});
            }
            lane->events_free.push_back(batch.event);
            lane->under_way.erase(lane->under_way.begin() + ptrdiff_t(i));
        }
    }

    bool hand_back(Lane* lane) const {
        if (lane->done.empty()) return false;
        uint64_t position = lane->shared->completed;
        for (const Completion& completion : lane->done) {
            *memory_.completion(lane->shared, position++) = completion;
        }
        fabric::store_release(&lane->shared->completed, position);
        lane->done.clear();
        return true;
    }

    void wait_for_streams() const {
        constexpr int64_t kLongestNs = 1'000'000'000;
        const int64_t start = fabric::now_ns();
        for (cudaStream_t stream : streams_) {
            while (stream != nullptr && cudaStreamQuery(stream) == cudaErrorNotReady &&
                   fabric::now_ns() - start < kLongestNs) {
                usleep(100);
            }
        }
    }

    StreamStore store_;
    CopySetup setup_;
    CopyMemory memory_;
    std::vector<Regions> regions_;  ///< by node
    std::vector<Lane> lanes_;
    std::vector<cudaStream_t> streams_;
};

void run(const std::string& bytes, const std::vector<int>& fds, Session& session) {
    constexpr int kLooks = 1024;
    const auto& setup = *reinterpret_cast<const CopySetup*>(bytes.data());
    const SharedMapping mapping(fds.at(0), CopyMemory::bytes(setup.num_lanes, setup.num_slots));
    Copies copies(bytes, mapping.start());
    session.ready();
    int64_t last_work = fabric::now_ns();
    for (int round = 0; round % kLooks != 0 || !session.ended(); ++round) {
        if (copies.step()) {
            last_work = fabric::now_ns();
        } else if (copies.busy() || fabric::now_ns() - last_work < kSpinNs) {
            fabric::relax();
        } else {
            copies.nap();
            if (session.ended()) return;
        }
    }
}

const RegisterJob kJob("copies", run);

}  // namespace

}  // namespace epcomm::carrier
