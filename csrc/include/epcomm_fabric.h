/// epcomm's fabric: bytes between the ranks of a rail, through triggers, proxy threads and a
/// transport. The C ABI; kernels and C++ use fabric/fabric.h.
#pragma once

#include "../protocol/fabric.h"
#include "epcomm.h"

#ifdef __cplusplus
extern "C" {
#endif

/// Wake the proxy thread that serves a channel if it naps. Host producers call it after every
/// trigger; for kernels, which cannot, a nap is short.
EPCOMM_API void epcomm_fabric_wake(const epcomm_fabric* fabric, int32_t channel);

#ifdef __cplusplus
}
#endif
