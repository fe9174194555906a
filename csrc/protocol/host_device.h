/// EPCOMM_HD marks functions that host and device code share, EPCOMM_COLD those of them that are
/// called, not inlined: what happens seldom must not cost the rest registers. EPCOMM_NO_UNROLL: a
/// loop that mostly ends at once stays short.
#pragma once

#ifdef __CUDACC__
#define EPCOMM_HD __host__ __device__
#define EPCOMM_COLD __host__ __device__ __noinline__
#define EPCOMM_NO_UNROLL _Pragma("unroll 1")
#else
#define EPCOMM_NO_UNROLL
#define EPCOMM_HD
#define EPCOMM_COLD __attribute__((noinline))
#endif
