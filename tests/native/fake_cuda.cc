// The fake's driver of a GPU whose memory is the host's.

#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "../../csrc/fabric/verbs/cuda_driver.h"
#include "fake_state.h"

namespace fake {

namespace {

using epcomm::fabric::CudaDriver;

int fail_cuda(const char* name, uint64_t a = 0, uint64_t b = 0, uint64_t c = 0) {
    return now().enter(name, a, b, c);
}

int cu_alloc(uint64_t* out, size_t bytes) {
    if (const int error = fail_cuda("cuMemAlloc", bytes)) return error;
    // Not where pages of 64 KiB begin, as the driver may do it.
    auto* start = static_cast<uint8_t*>(aligned_alloc(64 << 10, (bytes / 65536 + 2) * 65536));
    *out = uint64_t(start) + 512;
    now().change("GPU memory", 1);
    return 0;
}

int cu_free(uint64_t pointer) {
    now().change("GPU memory", -1);
    free(reinterpret_cast<void*>(pointer - 512));
    return 0;
}

int cu_export(void* handle, uint64_t pointer, size_t bytes, int type, unsigned long long) {
    if (const int error = fail_cuda("export", pointer, bytes, uint64_t(type))) return error;
    if (pointer % 4096 != 0 || bytes % 4096 != 0) return 1;
    now().exported = pointer;
    *static_cast<int*>(handle) = open("/dev/null", O_RDONLY | O_CLOEXEC);
    return 0;
}

int cu_host_alloc(void** out, size_t bytes, unsigned flags) {
    if (const int error = fail_cuda("cuMemHostAlloc", bytes, flags)) return error;
    *out = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    now().change("pinned memory", 1);
    return 0;
}

int cu_host_free(void* memory) {
    now().change("pinned memory", -1);
    free(memory);
    return 0;
}

int cu_host_register(void* start, size_t bytes, unsigned flags) {
    if (const int error = fail_cuda("host_register", uint64_t(start), bytes, flags)) return error;
    now().change("mapping", 1);
    return 0;
}

int cu_host_unregister(void*) {
    now().change("mapping", -1);
    return 0;
}

int cu_host_pointer(uint64_t* out, void* host, unsigned) {
    *out = uint64_t(host);
    return fail_cuda("host_pointer", uint64_t(host));
}

int cu_stream_create(void** stream, unsigned flags) {
    *stream = stream;
    now().change("stream", 1);
    return fail_cuda("stream_create", flags);
}

int cu_stream_destroy(void*) {
    now().change("stream", -1);
    return 0;
}

int cu_retain(void** context, int) {
    *context = context;
    now().change("CUDA context", 1);
    return 0;
}

int cu_release(int) {
    now().change("CUDA context", -1);
    return 0;
}

}  // namespace

const CudaDriver& cuda_table() {
    static CudaDriver table = [] {
        CudaDriver t{};
        t.device_get = [](int* device, int ordinal) { return *device = ordinal, 0; };
        t.device_get_pci = [](char* text, int bytes, int) {
            return snprintf(text, size_t(bytes), "0000:1B:00.0"), 0;
        };
        t.retain = cu_retain;
        t.release = cu_release;
        t.push = [](void*) { return 0; };
        t.pop = [](void**) { return 0; };
        t.export_range = cu_export;
        t.alloc = cu_alloc;
        t.free = cu_free;
        t.set_attribute = [](const void*, int attribute, uint64_t pointer) {
            return fail_cuda("set_attribute", uint64_t(attribute), pointer);
        };
        t.host_alloc = cu_host_alloc;
        t.host_free = cu_host_free;
        t.host_register = cu_host_register;
        t.host_unregister = cu_host_unregister;
        t.host_pointer = cu_host_pointer;
        t.stream_create = cu_stream_create;
        t.stream_destroy = cu_stream_destroy;
        t.stream_wait = [](void*) { return 0; };
        t.to_host = [](void* to, uint64_t from, size_t bytes, void*) {
            return memcpy(to, reinterpret_cast<void*>(from), bytes), 0;
        };
        t.to_device = [](uint64_t to, const void* from, size_t bytes, void*) {
            return memcpy(reinterpret_cast<void*>(to), from, bytes), 0;
        };
        return t;
    }();
    return table;
}

}  // namespace fake

namespace epcomm::fabric {

const CudaDriver& cuda_driver() { return fake::cuda_table(); }

}  // namespace epcomm::fabric
