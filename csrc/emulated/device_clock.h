// The device's timer, read from the host.
#pragma once

#include <stdint.h>

namespace epcomm::emulated {

/// Nanoseconds of %globaltimer of the current device. Runs a kernel; blocks. Throws
/// std::runtime_error.
int64_t device_clock_ns();

}  // namespace epcomm::emulated
