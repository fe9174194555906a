/// epcomm's fabric: bytes between the ranks of a rail, through triggers, proxy threads and a
/// transport, or by producers that fill the NICs' send queues themselves (a *direct* transport).
/// The C ABI; kernels and C++ call fabric/fabric.h and fabric/ibgda.h.
///
/// Every rank of a rail does, in this order:
///
///     epcomm_fabric_create -> add_region for each -> open -> address for each peer
///         -> exchange the addresses by any means -> connect -> put, ... -> stop -> destroy
///
/// Functions that return int return 0, or -1 and leave a text for epcomm_fabric_text.
#pragma once

#include "../protocol/fabric.h"
#include "epcomm.h"

#ifdef __cplusplus
extern "C" {
#endif

/// One rank's end of a fabric.
typedef struct epcomm_fabric_end epcomm_fabric_end;

typedef struct {
    int32_t node;           ///< this rank's node number
    int32_t num_nodes;      ///< N
    int32_t num_channels;   ///< 1 to 64
    int32_t num_rings;      ///< 1 to 8
    int32_t num_threads;    ///< 1 to num_rings
    int32_t num_slots;      ///< triggers a ring holds; a power of two
    int32_t max_in_flight;  ///< operations a thread may have under way
    int32_t spin;           ///< empty rounds of a thread before it naps; 0 where cores are few
    int32_t device_fills;   ///< kernels fill the rings, so no producer can wake a thread
    /// Of a modelled network whose NICs are on a GPU: messages that epcomm_fabric_keep_messages may
    /// ask for. The same on all ranks.
    int32_t max_messages;
    int64_t longest_nap_ns;
    int64_t timeout_ns;     ///< how long a producer waits for a free slot
    void* host_memory;      ///< epcomm_fabric_host_bytes zeros; pinned where kernels fill the rings
    void* producer_memory;  ///< epcomm_fabric_producer_bytes zeros, where the producers run
} epcomm_fabric_config;

/// Memory that operations may use.
typedef struct {
    int32_t id;      ///< 0 to 7, the same meaning on every rank; 0 are the signals
    int32_t device;  ///< CUDA device, or -1 for host memory
    int32_t fd;      ///< host memory: the memfd it maps, or -1
    int32_t reserved;
    void* pointer;
    uint64_t bytes;
    uint64_t fd_offset;
} epcomm_fabric_region;

EPCOMM_API int64_t epcomm_fabric_host_bytes(int32_t num_slots, int32_t num_rings);
EPCOMM_API int64_t epcomm_fabric_producer_bytes(int32_t num_rings);

/// Null if the configuration is not possible or there is no such transport; the text is then that
/// of a null end. `options`: the transport's own, "name=value" separated by spaces.
EPCOMM_API epcomm_fabric_end* epcomm_fabric_create(const epcomm_fabric_config* config,
                                                   const char* transport, const char* options);
EPCOMM_API int epcomm_fabric_add_region(epcomm_fabric_end* end, const epcomm_fabric_region* region);
EPCOMM_API int epcomm_fabric_open(epcomm_fabric_end* end);

/// Copies what node `peer` needs into `into`; returns its size, which may exceed `capacity` (then
/// nothing was copied), or -1.
EPCOMM_API int64_t epcomm_fabric_address(epcomm_fabric_end* end, int32_t peer, void* into,
                                         int64_t capacity);

/// `addresses[n]`, of `sizes[n]` bytes, is what node n's rank made for this one. Starts the
/// proxy threads, unless the transport is direct.
EPCOMM_API int epcomm_fabric_connect(epcomm_fabric_end* end, const void* const* addresses,
                                     const int64_t* sizes);

/// Names of the transports this library has, separated by spaces.
EPCOMM_API const char* epcomm_fabric_transports(void);

/// Bytes that a transport takes beside regions and rings; -1 where there is none of the name.
EPCOMM_API int64_t epcomm_fabric_transport_bytes(const char* transport, int32_t num_nodes,
                                                 int32_t num_channels, int32_t num_signals);

/// What the last failure was, or what the transport chose; valid until the next call.
EPCOMM_API const char* epcomm_fabric_text(const epcomm_fabric_end* end);
EPCOMM_API const char* epcomm_fabric_describe(epcomm_fabric_end* end);

/// What producers take; a kernel by value. Of a direct end: only the state; it refuses operations.
EPCOMM_API const epcomm_fabric* epcomm_fabric_of(const epcomm_fabric_end* end);

/// The same for the producers of a direct end that is connected; null for other ends.
EPCOMM_API const epcomm_ibgda* epcomm_fabric_ibgda_of(const epcomm_fabric_end* end);

/// Whether peers may let the NICs of a direct end that is open add to its words (fetch_add_at of
/// fabric/ibgda.h). Signals need no such thing.
EPCOMM_API int epcomm_fabric_has_atomics(const epcomm_fabric_end* end);

/// Copy what was sent since the last call with `restart`, by a modelled network. -1: there is none.
/// Nothing is under way.
EPCOMM_API int epcomm_fabric_count(epcomm_fabric_end* end, epcomm_fabric_traffic* into,
                                   int32_t restart);

/// Keep the last `capacity` messages, and as many events, from now on, and forget older ones.
/// Returns 1 where the transport keeps none, because it models no network or cannot tell, or has no
/// room for so many.
EPCOMM_API int epcomm_fabric_keep_messages(epcomm_fabric_end* end, uint64_t capacity);

/// Copy the kept messages, oldest first, at most `capacity`; returns how many, or -1. `total`: all
/// since epcomm_fabric_keep_messages.
EPCOMM_API int64_t epcomm_fabric_messages(epcomm_fabric_end* end, epcomm_fabric_message* into,
                                          int64_t capacity, uint64_t* total);

/// The same of events: what emulated network cards did on purpose, or found.
EPCOMM_API int64_t epcomm_fabric_events(epcomm_fabric_end* end, epcomm_fabric_event* into,
                                        int64_t capacity, uint64_t* total);

/// What an event was, in words, such as "fault: delay"; valid until the thread's next call.
EPCOMM_API const char* epcomm_fabric_event_text(int32_t kind, int32_t code);

/// Look after the threads: one that ended, or showed no sign of life for `stall_ns`, fails the
/// fabric. So does an error that no producer meets, such as a rule of the network card's interface
/// that an emulated card found broken. Returns the epcomm_fabric_status; the error record is in
/// state->error.
EPCOMM_API int epcomm_fabric_check(epcomm_fabric_end* end, int64_t stall_ns);

/// Planes lost to peers so far (see epcomm_ibgda.failover).
EPCOMM_API uint32_t epcomm_fabric_num_losses(const epcomm_fabric_end* end);

/// The index-th of them in words, what peer it concerns in `peer`; null if its record was not kept.
/// Valid until the next call.
EPCOMM_API const char* epcomm_fabric_loss_text(epcomm_fabric_end* end, uint32_t index,
                                               int32_t* peer);

/// Whether the process of a peer is known to be gone.
EPCOMM_API int epcomm_fabric_peer_gone(epcomm_fabric_end* end, int32_t peer);

/// Carry out what is in the rings and under way, for at most `timeout_ns`; then end the threads and
/// every wait on the fabric, and close the transport. Takes at most 2 s longer. Returns 0, or 1 if
/// a thread is stuck: then the memory of regions, `host_memory` and `producer_memory` must stay.
EPCOMM_API int epcomm_fabric_stop(epcomm_fabric_end* end, int64_t timeout_ns);

/// After stop.
EPCOMM_API void epcomm_fabric_destroy(epcomm_fabric_end* end);

/// The calls of fabric/fabric.h for host producers. Tickets are 0 on failure.
EPCOMM_API uint64_t epcomm_fabric_put(const epcomm_fabric* fabric, int32_t peer, int32_t channel,
                                      const epcomm_fabric_place* remote,
                                      const epcomm_fabric_place* local, uint64_t bytes);
EPCOMM_API uint64_t epcomm_fabric_put_signal(const epcomm_fabric* fabric, int32_t peer,
                                             int32_t channel, const epcomm_fabric_place* remote,
                                             const epcomm_fabric_place* local, uint64_t bytes,
                                             int32_t signal);
EPCOMM_API uint64_t epcomm_fabric_signal_add(const epcomm_fabric* fabric, int32_t peer,
                                             int32_t channel, int32_t signal, uint64_t value);
EPCOMM_API uint64_t epcomm_fabric_noop(const epcomm_fabric* fabric, int32_t channel);
EPCOMM_API int epcomm_fabric_done(const epcomm_fabric* fabric, int32_t channel, uint64_t ticket);
EPCOMM_API int epcomm_fabric_flush(const epcomm_fabric* fabric, int32_t channel,
                                   int64_t timeout_ns);

/// Wake the proxy thread that serves a channel if it naps. The calls above do it; for kernels,
/// which cannot, a nap is short.
EPCOMM_API void epcomm_fabric_wake(const epcomm_fabric* fabric, int32_t channel);

/// A kernel of producers, for tests and measurements; only in a library built with CUDA. Chunk k
/// goes from `local` + k * bytes to `remote` + k * bytes at `peer`, on channel k % num_channels,
/// with signal `first_signal` + channel; block b does chunks b, b + num_blocks, ... All blocks of
/// both ranks must be resident together.
typedef struct {
    epcomm_fabric fabric;
    uint64_t* out;            ///< local memory of the chunks
    const uint64_t* in;       ///< where the peer puts its chunks
    const uint64_t* signals;  ///< this rank's counters
    uint64_t* result;         ///< [0] words that differ, [1] calls that failed, [2] nanoseconds
    epcomm_fabric_place local;
    epcomm_fabric_place remote;
    uint64_t bytes;
    uint64_t epoch;  ///< 1 for the first run; words and counts depend on it
    int64_t timeout_ns;
    int32_t peer;
    int32_t num_chunks;  ///< a multiple of num_channels
    int32_t num_channels;
    int32_t first_signal;  ///< where this rank raises; the peer raises `their_signal` here
    int32_t their_signal;
    int32_t num_blocks;
    int32_t num_threads;
    int32_t triggers;    ///< measuring: empty triggers of every thread, or rounds of signals
    int32_t round_trip;  ///< measuring: wait for each trigger to complete
    int32_t leads;       ///< measuring signals: sends first; counters stand at `epoch` before
} epcomm_fabric_probe;

/// Fill the chunks, send them, wait for the peer's and compare. Returns a cudaError_t.
EPCOMM_API int epcomm_fabric_probe_exchange(const epcomm_fabric_probe* probe, void* stream);

/// A producer of a direct end, for self-tests: puts `bytes` and signal `signal` so many times,
/// after each a lone `other_signal`, and then, if it may, adds 1 to `counter`; waits for the
/// completion of each, and for the old value of the counter.
///
/// `result`: [0] rounds that failed; then the shortest nanoseconds of a call, which returns once it
/// has rung, and from there to its completion: [1] [2] of a put, [3] [4] a signal, [5] [6] an
/// addition. All ones where there was none.
typedef struct {
    epcomm_ibgda ibgda;
    uint64_t* result;
    epcomm_fabric_place local;
    epcomm_fabric_place remote;
    epcomm_fabric_place counter;  ///< a word of the peer
    epcomm_fabric_place answers;  ///< local: what it held before, a word for each round
    uint64_t bytes;
    int64_t timeout_ns;
    int32_t peer;
    int32_t channel;
    int32_t signal;
    int32_t other_signal;
    int32_t rounds;
    int32_t adds;  ///< 0: not at all, for NICs without atomics
} epcomm_ibgda_probe;

/// By a thread of the host, for an end whose regions are all the host's.
EPCOMM_API void epcomm_fabric_measure_ibgda(const epcomm_ibgda_probe* probe);

/// By a thread of the GPU; only in a library built with CUDA. Returns a cudaError_t.
EPCOMM_API int epcomm_fabric_probe_ibgda(const epcomm_ibgda_probe* probe, void* stream);

/// What else than an epcomm_fabric_op a producer can be told to call.
enum { EPCOMM_FABRIC_CALL_DONE = 4, EPCOMM_FABRIC_CALL_FLUSH, EPCOMM_FABRIC_CALL_LOOK };

/// One call of fabric/ibgda.h.
typedef struct {
    int32_t what;  ///< an epcomm_fabric_op, or one of those above
    int32_t peer;
    int32_t channel;
    int32_t signal;
    epcomm_fabric_place local;
    epcomm_fabric_place remote;
    uint64_t bytes;
    uint64_t value;  ///< of a signal_add; of done: the ticket
} epcomm_fabric_call;

/// A producer of a direct end that makes calls one after another, for tests.
typedef struct {
    epcomm_ibgda ibgda;
    const epcomm_fabric_call* calls;
    uint64_t* results;  ///< of each call: the ticket, or whether it is done or quiet
    int64_t count;
    int64_t timeout_ns;  ///< of a flush
} epcomm_ibgda_calls;

/// By a thread of the GPU; only in a library built with CUDA. Returns a cudaError_t.
EPCOMM_API int epcomm_fabric_probe_calls(const epcomm_ibgda_calls* calls, void* stream);

/// Writers whose posting rate is measured, over either kind of fabric. The first lane of each warp
/// puts `bytes`, a signal with each put, and waits until all of it has completed. Warps
/// c * num_warps to (c + 1) * num_warps - 1 post to channel c, whose signal is `first_signal` + c.
/// Put i of warp w goes between the places number w * num_places + i % num_places of both regions,
/// `bytes` apart.
typedef struct {
    epcomm_fabric fabric;  ///< what writers of KIND_PROXY take
    epcomm_ibgda ibgda;    ///< what those of KIND_IBGDA take
    void* unread;          ///< for epcomm_fabric_probe_unread; where queues or rings lie
    /// [0] warps that failed; ns of the GPU's timer: [1] the first warp began (all ones before),
    /// [2] the last one had posted all (0 before), [3] and knew that it had completed (0 before).
    uint64_t* result;
    uint64_t* times;  ///< null; or, for one warp, which then waits for each put: ns of each [puts]
    epcomm_fabric_place local;
    epcomm_fabric_place remote;
    uint64_t bytes;      ///< of a put; a multiple of EPCOMM_FABRIC_UNIT, not 0
    int64_t timeout_ns;  ///< of a wait for completions
    int32_t kind;        ///< epcomm_fabric_kind
    int32_t peer;
    int32_t num_channels;
    int32_t num_warps;  ///< of a channel
    int32_t puts;       ///< of a warp
    int32_t num_places;
    int32_t first_signal;
} epcomm_posting_probe;

/// Post. Only in a library built with CUDA, as all of these. Return a cudaError_t.
EPCOMM_API int epcomm_fabric_probe_posting(const epcomm_posting_probe* probe, void* stream);

/// The floor: the same stores and fences by as many warps, each into a queue or ring of its own
/// that nobody reads, so without a wait or an atomic operation. `result` as above, but for [3].
EPCOMM_API int epcomm_fabric_probe_unread(const epcomm_posting_probe* probe, void* stream);

/// Bytes of `unread` for so many warps of all channels.
EPCOMM_API int64_t epcomm_fabric_probe_unread_bytes(int32_t kind, int32_t num_warps);

/// Put empty triggers, or send a signal back and forth; `result` gets the longest thread's time.
/// Return a cudaError_t.
EPCOMM_API int epcomm_fabric_probe_triggers(const epcomm_fabric_probe* probe, void* stream);
EPCOMM_API int epcomm_fabric_probe_ping(const epcomm_fabric_probe* probe, void* stream);

/// The same by the calling host thread. Return nanoseconds, or -1.
EPCOMM_API int64_t epcomm_fabric_measure_triggers(const epcomm_fabric* fabric, int32_t peer,
                                                  int32_t channel, int32_t count,
                                                  int32_t round_trip, int64_t timeout_ns);
EPCOMM_API int64_t epcomm_fabric_measure_ping(const epcomm_fabric* fabric, int32_t peer,
                                              int32_t signal, const uint64_t* counter,
                                              uint64_t base, int32_t rounds, int32_t leads,
                                              int64_t timeout_ns);

/// Fields and integers of the fabric's structures, as epcomm_fields and epcomm_constants.
EPCOMM_API const epcomm_field* epcomm_fabric_fields(uint32_t* count);
EPCOMM_API const epcomm_constant* epcomm_fabric_constants(uint32_t* count);

#ifdef __cplusplus
}
#endif
