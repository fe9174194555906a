/// epcomm_cuda: the C ABI of the CUDA back end inside a node, and what its kernels share.
///
/// A rank's node peers reach two of its device allocations by CUDA IPC: the control block
/// (`epcomm_cuda_control`, then announcements) and windows, where rows are written at their final
/// place. Streams are `cudaStream_t` passed as `void*`, so that no CUDA header is needed here.
#pragma once

#include "epcomm.h"
#include "epcomm_cuda_timeline.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    EPCOMM_CUDA_MAX_LOCAL = EPCOMM_LIMIT_max_local_ranks,
    EPCOMM_CUDA_MAX_DESTS = 32,      ///< destinations of a token: one lane of a warp each
    EPCOMM_CUDA_MAX_EXPERTS = 8192,  ///< the layout kernel counts experts in shared memory
    EPCOMM_CUDA_TIMED_CALLS = 64,    ///< calls whose times are kept
    EPCOMM_CUDA_FREE_BITS = 8,       ///< of the number of free windows that a report tells
};

/// A 64-bit counter that only grows (the number of the last epoch it was raised in), alone on
/// its cache-line pair.
typedef struct {
    uint64_t value;
    uint64_t reserved[15];
} epcomm_cuda_counter;

/// Moments of a call, in nanoseconds of the GPU's clock.
typedef enum {
    EPCOMM_CUDA_STAMP_START = 0,      ///< its first kernel begins
    EPCOMM_CUDA_STAMP_COUNTED = 1,    ///< first dispatch: this rank's counts are announced
    EPCOMM_CUDA_STAMP_ANNOUNCED = 2,  ///< all announcements are in
    EPCOMM_CUDA_STAMP_PLACED = 3,     ///< first dispatch: every copy has its row
    EPCOMM_CUDA_STAMP_MOVED = 4,      ///< this rank's rows are stored, or its sums done
    EPCOMM_CUDA_STAMP_END = 5,        ///< all ranks' are
    EPCOMM_CUDA_STAMPS = 6,
} epcomm_cuda_stamp;

/// When a call came to its moments; a stamp it has no use for keeps an older call's.
typedef struct {
    uint64_t call;  ///< number of the call
    uint64_t at[EPCOMM_CUDA_STAMPS];
    uint64_t reserved;
} epcomm_cuda_times;

/// How a call ended, or why a kernel left early.
typedef enum {
    EPCOMM_CUDA_OK = 0,
    EPCOMM_CUDA_REFUSED = 1,     ///< a rank's arguments were refused (its announcement says why)
    EPCOMM_CUDA_MISMATCH = 2,    ///< ranks disagree about an argument
    EPCOMM_CUDA_GROW = 3,        ///< a window is too small for the rows announced
    EPCOMM_CUDA_FIXED_ROWS = 4,  ///< more rows than the fixed-size output holds
    EPCOMM_CUDA_TIMEOUT = 5,     ///< a rank stayed silent past the deadline
    EPCOMM_CUDA_ABORTED = 6,     ///< another rank gave up; its error was copied here
    EPCOMM_CUDA_FABRIC = 8,      ///< the fabric between nodes failed; it knows why
    EPCOMM_CUDA_STALE = 7,       ///< the dispatch that made the routes was itself refused
} epcomm_cuda_verdict;

typedef struct {
    int32_t verdict;   ///< epcomm_cuda_verdict
    int32_t op;        ///< epcomm_op
    int32_t phase;     ///< epcomm_phase
    int32_t channel;   ///< thread block
    int32_t reporter;  ///< rank that met it
    int32_t rank;      ///< rank waited for, or the one that disagrees
    uint64_t epoch;
    uint64_t expected;
    uint64_t seen;
} epcomm_cuda_error;

/// Host-mapped memory the kernels report to. `tokens_per_expert i32[E / R]` follows it.
typedef struct {
    uint64_t prepared;   ///< number of the last dispatch judged; what follows is its (release)
    uint64_t epoch;      ///< in which it ran
    int32_t verdict;     ///< the data kernel comes to the same
    int32_t rows;        ///< first call: rows this rank receives
    int32_t max_rows;    ///< rows the fullest rank receives
    int32_t bad_choice;  ///< token * K + k of the first expert id out of range, or -1
    int32_t failed;      ///< nonzero: the buffer is unusable, `error` says why (release)
    int32_t reserved;
    /// Call number << EPCOMM_CUDA_FREE_BITS | windows left to the rank that has fewest, of a call
    /// judged: one word, so that the host sees which call's it is.
    uint64_t free_windows;
    uint64_t refusals;        ///< calls that ended before data moved (release)
    uint64_t acknowledged;    ///< of these, seen by the host, which writes this
    uint64_t refused_epoch;   ///< of the first that was not
    int32_t refused_verdict;  ///< why
    int32_t refused_choice;   ///< its bad_choice
    epcomm_cuda_error error;
} epcomm_cuda_report;

/// In an announcement, `window_fd` is the number of windows its rank has free beside the one it
/// announces: nobody needs to wait for a verdict while every rank has one left.
///
/// Start of a rank's control block. Counters are indexed by the local rank that raises them.
/// Announcements follow: two (by parity of the epoch) for each rank of the world, each
/// `epcomm_announcement | node_tokens i32[N] | rank_rows i32[R] | expert_rows i32[E]`; then, for
/// each rank of the world, a counter of the last epoch it has announced.
typedef struct {
    epcomm_cuda_counter arrived[EPCOMM_CUDA_MAX_LOCAL];
    epcomm_cuda_counter released[EPCOMM_CUDA_MAX_LOCAL];
    epcomm_cuda_counter aborted;  ///< nonzero: a rank gave up; `error` says on whom
    epcomm_cuda_error error;
    // Used by the owner's kernels alone.
    epcomm_cuda_counter epoch;    ///< calls finished; the next call is this + 1
    epcomm_cuda_counter counted;  ///< meetings that all blocks have come to, by epoch
    uint32_t counting;            ///< blocks that have come to the next
    uint32_t leaving;             ///< blocks that are done
    uint32_t dealt;               ///< tokens handed out beyond the first of every warp
    int32_t bad_choice;           ///< smallest offending token * K + k, or INT32_MAX
    int32_t reporting;            ///< taken by the first thread that reports an error
    epcomm_cuda_times times[EPCOMM_CUDA_TIMED_CALLS];  ///< by call number
} epcomm_cuda_control;

/// Where one copy of a token goes. A token's list is in order of (rank, choice), then rank = -1.
typedef struct {
    int16_t rank;    ///< local rank
    int16_t choice;  ///< layout expert: which choice k this is; layout rank: -1
    int32_t row;     ///< row at that rank
} epcomm_cuda_dest;

/// What stays the same for the life of a buffer. In a world of one node, local ranks are ranks.
typedef struct {
    int32_t rank;
    int32_t num_ranks;
    int32_t num_nodes;
    int32_t local_rank;
    int32_t num_local;  ///< ranks of this node
    int32_t num_experts;
    int32_t num_topk;
    int32_t num_windows;  ///< windows a rank may have
    int32_t delay_ns;     ///< tests: longest delay at a place of the protocol; 0: none
    int64_t timeout_ns;
    int32_t node_ranks[EPCOMM_CUDA_MAX_LOCAL];             ///< rank of every local rank
    epcomm_cuda_control* controls[EPCOMM_CUDA_MAX_LOCAL];  ///< by local rank
    uint8_t* const* windows;  ///< device array [num_local][num_windows]
    epcomm_cuda_report* report;
    int32_t* block_bins;             ///< scratch: [blocks][R + E]
    epcomm_cuda_timeline* timeline;  ///< null: nothing is noted
} epcomm_cuda_world;

/// What a row of an output consists of.
typedef struct {
    int32_t row_bytes;
    int32_t scale_bytes;
    int32_t num_topk;
    int32_t layout;     ///< epcomm_layout
    int32_t with_topk;  ///< top-k ids (layout rank) and sources are written
    int32_t with_weights;
} epcomm_cuda_row;

/// Byte offsets of the parts of a window that holds `rows` rows, and its size.
typedef struct {
    uint64_t rows;
    uint64_t scales;
    uint64_t topk_idx;
    uint64_t topk_weights;
    uint64_t source;
    uint64_t bytes;
} epcomm_cuda_parts;

/// Device arrays that a first dispatch fills, and later calls with its handle use again.
typedef struct {
    const int64_t* topk_idx;  ///< [T, K]
    epcomm_cuda_dest* dests;  ///< [T, D]
    int32_t* rows;            ///< rows at every rank, [R]
    int32_t* group_start;     ///< first row of a local expert, [E / R + 1]
    int32_t* group_count;     ///< rows of a local expert without padding, [E / R]
    int32_t* verdict;         ///< of the dispatch; null (a refused call) = OK
    int32_t num_tokens;
    int32_t max_dests;  ///< D
} epcomm_cuda_routes;

/// First call among nodes, its first kernel: count, announce, and find the row of every copy.
typedef struct {
    epcomm_cuda_world world;
    epcomm_announcement announcement;  ///< `epoch` is filled in by the kernel
    uint64_t number;                   ///< of the call, by the host; a graph repeats it
    epcomm_cuda_row row;
    epcomm_cuda_routes routes;
    int32_t num_blocks;
    int32_t reserved;
} epcomm_cuda_layout;

/// Store every copy at its place, signal, wait for all peers' rows. A first call inside a node
/// does before what a layout kernel does among nodes.
typedef struct {
    epcomm_cuda_world world;
    epcomm_announcement announcement;
    uint64_t number;
    epcomm_cuda_row row;
    epcomm_cuda_routes routes;
    const void* x;              ///< [T, row_in_bytes]
    const void* scales;         ///< [T, scale_bytes], packed pairs only
    const float* topk_weights;  ///< [T, K]
    int32_t row_in_bytes;
    int32_t input_format;  ///< epcomm_format of x
    int32_t announce;      ///< cached handle: only announce before; 0: a first call
    int32_t num_blocks;
    int32_t num_warps;
    int32_t stages;  ///< rows in flight per warp, 1 to 4; fewer if they do not fit
} epcomm_cuda_dispatch;

/// Sum every token's rows, in order of (rank, choice), in float32.
typedef struct {
    epcomm_cuda_world world;
    epcomm_announcement announcement;
    uint64_t number;
    epcomm_cuda_routes routes;
    const void* bias[2];  ///< [T, H] of the rows' type, added in order, or null
    void* out;            ///< [T, H]
    float* topk_weights;  ///< out [T, K], or null
    int32_t row_bytes;
    int32_t layout;
    int32_t num_blocks;
    int32_t num_threads;
} epcomm_cuda_combine;

/// Measure: move rows the way dispatch does, without ranks. Row i is row i mod `from_rows` of
/// `from`; its copies go to rows i * copies, i * copies + 1, ... of `to`, modulo `to_rows`.
typedef struct {
    const uint8_t* from;
    uint8_t* to;
    int64_t from_rows;
    int64_t to_rows;
    int64_t num_rows;
    int32_t row_bytes;  ///< a multiple of 16
    int32_t copies;     ///< of each row
    int32_t num_blocks;
    int32_t num_warps;  ///< of a block
} epcomm_cuda_calibrate;

/// The fields of every structure above, and the enumerators, as epcomm_fields does. The field ""
/// ends a structure and has its size as offset.
EPCOMM_API const epcomm_field* epcomm_cuda_fields(uint32_t* count);
EPCOMM_API const epcomm_constant* epcomm_cuda_constants(uint32_t* count);

/// Where the parts of a window with `rows` rows lie.
EPCOMM_API void epcomm_cuda_window_parts(const epcomm_cuda_row* row, int64_t rows,
                                         epcomm_cuda_parts* parts);

/// Bytes of a control block with its announcements.
EPCOMM_API int64_t epcomm_cuda_control_bytes(int32_t num_nodes, int32_t num_ranks,
                                             int32_t num_experts);

/// Byte offset, in a control block, of the announcement `rank` made for `epoch`.
EPCOMM_API int64_t epcomm_cuda_announcement_offset(int32_t num_nodes, int32_t num_ranks,
                                                   int32_t num_experts, int32_t rank,
                                                   uint64_t epoch);

/// Byte offset, in a control block, of the announcement `rank` made for the refused call that
/// `report->refused_epoch` tells of.
EPCOMM_API int64_t epcomm_cuda_refused_offset(int32_t num_nodes, int32_t num_ranks,
                                              int32_t num_experts, int32_t rank);

/// Load every kernel, so that no later launch has to wait for one that spins. Returns 0 or a
/// cudaError_t, as all functions below.
EPCOMM_API int epcomm_cuda_load(void);

/// Where a buffer's calls ran last. They share counters, so each waits for the one before it,
/// whatever streams they are on.
typedef struct {
    void* done[2];     ///< cudaEvent_t after the last call: outside of graph captures, and inside
    void* stream[2];   ///< it ran on
    int32_t used[2];   ///< there was one
    uint64_t capture;  ///< the capture that `done[1]` belongs to
    void* next;        ///< cudaEvent_t of the caller's to be done[0] of the call being made
} epcomm_cuda_sequence;

EPCOMM_API int epcomm_cuda_sequence_open(epcomm_cuda_sequence* sequence);
EPCOMM_API void epcomm_cuda_sequence_close(epcomm_cuda_sequence* sequence);

/// Let what comes on `stream` wait for the last call. A capture waits for nothing outside itself:
/// whoever replays the graph orders it with other calls. `capture` = id of the capture, 0 = none.
EPCOMM_API int epcomm_cuda_enter(epcomm_cuda_sequence* sequence, void* stream, uint64_t* capture);

/// Launch a call's kernel on the stream last entered with.
EPCOMM_API int epcomm_cuda_launch_dispatch(const epcomm_cuda_dispatch* call,
                                           epcomm_cuda_sequence* sequence, void* stream);
EPCOMM_API int epcomm_cuda_launch_combine(const epcomm_cuda_combine* call,
                                          epcomm_cuda_sequence* sequence, void* stream);

/// Events without timing. `query` returns cudaErrorNotReady before the event has happened.
EPCOMM_API int epcomm_cuda_event_open(void** event);
EPCOMM_API int epcomm_cuda_event_close(void* event);
EPCOMM_API int epcomm_cuda_event_record(void* event, void* stream);
EPCOMM_API int epcomm_cuda_event_wait(void* event, void* stream);
EPCOMM_API int epcomm_cuda_event_query(void* event);

/// Part of a window as a tensor library may adopt it: DLPack's DLManagedTensor, and its extents.
typedef struct epcomm_cuda_view {
    void* data;
    int32_t device_type;
    int32_t device;
    int32_t ndim;
    uint8_t code;  ///< kind of number
    uint8_t bits;
    uint16_t lanes;
    int64_t* shape;    ///< `extents`
    int64_t* strides;  ///< null: contiguous
    uint64_t byte_offset;
    void* context;                              ///< the loan
    void (*destroy)(struct epcomm_cuda_view*);  ///< called by the library that adopted it, once
    int64_t extents[2];
} epcomm_cuda_view;

enum { EPCOMM_CUDA_VIEWS = 5 };  ///< parts of a window that may be tensors at a time

/// A window and the tensors made of it. Each of `views` is for one of them; those of one loan are
/// gone before the window is lent again.
typedef struct {
    int32_t holders;  ///< tensors that live, and the buffer until it closes the loan (atomic)
    void* memory;
    epcomm_cuda_view views[EPCOMM_CUDA_VIEWS];
} epcomm_cuda_loan;

/// A loan of `memory` made by cudaMalloc on a device (-1: tests, of the host's); null: no host
/// memory.
EPCOMM_API epcomm_cuda_loan* epcomm_cuda_loan_open(void* memory, int32_t device);

/// Count a view that is about to be adopted.
EPCOMM_API void epcomm_cuda_loan_lend(epcomm_cuda_view* view);

/// The buffer lends it no more: the memory is freed, now or with the last tensor.
EPCOMM_API void epcomm_cuda_loan_close(epcomm_cuda_loan* loan);

/// Copy device memory, in order of the stream.
EPCOMM_API int epcomm_cuda_copy(void* to, const void* from, uint64_t bytes, void* stream);

/// Launch the calibration kernel.
EPCOMM_API int epcomm_cuda_launch_calibrate(const epcomm_cuda_calibrate* call, void* stream);

/// Let what comes on stream `then` wait for all that is on stream `first` by now.
EPCOMM_API int epcomm_cuda_order(void* first, void* then);

/// A moment by the GPU's timer and by the host's monotonic clock, which the pair may miss by
/// `error_ns`. Waits for the kernels that run before the one that reads the timer.
EPCOMM_API int epcomm_cuda_compare_clocks(int64_t* device_ns, int64_t* host_ns, int64_t* error_ns);

/// CUDA versions that the driver supports (0: no driver) and that this library was built with, as
/// 12040 for 12.4.
EPCOMM_API int epcomm_cuda_versions(int32_t* driver, int32_t* runtime);

/// Text of a cudaError_t.
EPCOMM_API const char* epcomm_cuda_error_text(int error);

/// Poll `report->prepared` until it is `number` or more, `report->failed` is raised (returns 1) or
/// `timeout_ns` passes (returns 2). Returns 0 on success, and a negative cudaError_t where the
/// context is unusable.
EPCOMM_API int epcomm_cuda_wait_prepared(const epcomm_cuda_report* report, uint64_t number,
                                         int64_t timeout_ns);

#ifdef __cplusplus
}
#endif
