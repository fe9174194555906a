/// A rank's control block: the shared memory its node peers signal it through.
#pragma once

#include <stdint.h>

#include "limits.h"

/// A 64-bit counter that only ever grows, alone on its cache-line pair. Writers add with release
/// order after their data; a reader that sees the expected value (acquire) sees the data.
/// It is never cleared: what a reader waits for grows with every call.
typedef struct {
    uint64_t value;
    uint32_t sleepers;  ///< threads inside futex(); lets the writer skip the system call
    uint32_t reserved[29];
} epcomm_counter;

/// What a rank is waiting for right now, so that a rank that gives up on it can tell the
/// culprit from another victim.
typedef struct {
    int32_t waiting;  ///< nonzero inside a wait
    int32_t op;       ///< epcomm_op
    int32_t phase;    ///< epcomm_phase
    int32_t rank;     ///< waited for
    uint64_t epoch;
    uint64_t expected;
    uint64_t seen;
} epcomm_wait_state;

typedef enum {
    EPCOMM_PHASE_NONE = 0,
    EPCOMM_PHASE_ANNOUNCE = 1,
    EPCOMM_PHASE_DATA = 2,
    EPCOMM_PHASE_ARRIVE = 3,
    EPCOMM_PHASE_RETURN = 4,   ///< combine: records coming home
    EPCOMM_PHASE_RELEASE = 5,  ///< combine: node peers still read my rows
    EPCOMM_PHASE_FAILED = 6,   ///< in an error: the rank failed, nobody waited for it
} epcomm_phase;

typedef struct {
    int32_t rank;
    int32_t pid;
    int32_t abi_version;
    int32_t reserved[29];
    epcomm_counter announced;  ///< calls announced by this rank
    epcomm_counter aborted;    ///< nonzero: some rank gave up; `error` says on whom
    epcomm_counter arrived[EPCOMM_LIMIT_max_local_ranks];   ///< rows stored here, by writer
    epcomm_counter released[EPCOMM_LIMIT_max_local_ranks];  ///< combines read here, by reader
    epcomm_wait_state wait;
    epcomm_wait_state error;  ///< written once, before `aborted` is raised
} epcomm_control;
