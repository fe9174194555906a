// The numbers of the formats, for kernels.
#pragma once

#include "../protocol/formats.h"

namespace epcomm {
namespace numbers {

#define EPCOMM_NUMBER(name, value) constexpr float name = value;
EPCOMM_NUMBERS(EPCOMM_NUMBER)
#undef EPCOMM_NUMBER

}  // namespace numbers
}  // namespace epcomm
