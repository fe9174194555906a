/// epcomm: the C ABI of libepcomm.
///
/// The library is free of Python, torch, MPI and CUDA headers. Everything that travels between
/// ranks or sits in shared memory is defined in `protocol/`; host code, device code and Python
/// (through `epcomm_fields`, `epcomm_constants` and `epcomm_numbers`) read those definitions and
/// repeat none.
#pragma once

#include <stdint.h>

#include "../protocol/announce.h"
#include "../protocol/chunk.h"
#include "../protocol/control.h"
#include "../protocol/formats.h"
#include "../protocol/limits.h"
#include "../protocol/record.h"

#ifdef __cplusplus
extern "C" {
#endif

#define EPCOMM_API __attribute__((visibility("default")))

/// A named integer: a limit, an enumerator or a size.
typedef struct {
    const char* name;
    int64_t value;
} epcomm_constant;

/// A named float32 of `protocol/formats.h`.
typedef struct {
    const char* name;
    float value;
} epcomm_number;

/// One field of a structure of `protocol/`. `kind` is a NumPy type character: i, u, f or S.
typedef struct {
    const char* structure;
    const char* field;
    uint32_t offset;
    uint32_t item_bytes;
    uint32_t count;
    char kind;
} epcomm_field;

/// The integers of the protocol; `*count` receives their number.
EPCOMM_API const epcomm_constant* epcomm_constants(uint32_t* count);

/// The float32 numbers that define the formats; `*count` receives their number.
EPCOMM_API const epcomm_number* epcomm_numbers(uint32_t* count);

/// The fields of every structure of the protocol; `*count` receives their number.
EPCOMM_API const epcomm_field* epcomm_fields(uint32_t* count);

/// Where each part of a record lies. Returns 0, or -1 if `shape` is out of the limits.
EPCOMM_API int epcomm_dispatch_record(const epcomm_record_shape* shape, epcomm_record* record);
EPCOMM_API int epcomm_combine_record(const epcomm_record_shape* shape, epcomm_record* record);

/// Complete a chunking of which N, node, max_records and num_channels are set, for records of up
/// to `record_bytes` and chunks of `chunk_records`; see epcomm_plan_chunks.
EPCOMM_API int epcomm_make_chunking(epcomm_chunking* chunking, int64_t record_bytes,
                                    int32_t chunk_records, int64_t max_bytes);

/// Where a slot of `peer` is, with records of `record_bytes`.
EPCOMM_API void epcomm_find_slot(const epcomm_chunking* chunking, int32_t peer, int32_t slot,
                                 int64_t record_bytes, epcomm_slot_place* place);

/// Which slot an item of work is, and the items of `records` records to or from the fullest peer.
EPCOMM_API void epcomm_find_item(const epcomm_chunking* chunking, int32_t item,
                                 epcomm_item_place* place);
EPCOMM_API int32_t epcomm_count_items(const epcomm_chunking* chunking, int32_t records);

/// Payload and scale bytes of one row in a wire format, before padding; -1 for an unknown format.
EPCOMM_API int64_t epcomm_payload_bytes(int32_t format, int64_t hidden);
EPCOMM_API int64_t epcomm_scale_bytes(int32_t format, int64_t hidden);

/// How to wait: see epcomm_counter_wait.
typedef struct {
    int64_t timeout_ns;           ///< how long, from the call
    int32_t peer_pid;             ///< process that will signal; 0 = not watched
    int32_t spin;                 ///< polls before sleeping
    const epcomm_counter* abort;  ///< nonzero value ends the wait; may be null
} epcomm_wait;

typedef enum {
    EPCOMM_WAIT_OK = 0,
    EPCOMM_WAIT_TIMEOUT = 1,
    EPCOMM_WAIT_PEER_GONE = 2,
    EPCOMM_WAIT_ABORTED = 3,
} epcomm_wait_result;

/// Add to a counter in shared memory (release) and wake who sleeps on it.
EPCOMM_API void epcomm_counter_add(epcomm_counter* counter, uint64_t amount);

/// The counter's value (acquire).
EPCOMM_API uint64_t epcomm_counter_read(const epcomm_counter* counter);

/// Sleep until the counter is at least `expected` (acquire), the deadline passes, the peer's
/// process is gone, or `how->abort` is raised. Returns an epcomm_wait_result.
EPCOMM_API int epcomm_counter_wait(epcomm_counter* counter, uint64_t expected,
                                   const epcomm_wait* how);

#ifdef __cplusplus
}
#endif
