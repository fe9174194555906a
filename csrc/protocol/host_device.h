/// EPCOMM_HD marks functions that host and device code share.
#pragma once

#ifdef __CUDACC__
#define EPCOMM_HD __host__ __device__
#else
#define EPCOMM_HD
#endif
