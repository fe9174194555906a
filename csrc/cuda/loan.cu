// Windows on loan to tensors, without Python: a tensor that dies may do so on any thread, and gives
// its window back by one atomic subtraction.
#include <cuda_runtime.h>

#include <new>

#include "epcomm_cuda.h"

namespace {

/// One holder less; the last frees the memory.
void let_go(epcomm_cuda_loan* loan) {
    if (__atomic_sub_fetch(&loan->holders, 1, __ATOMIC_ACQ_REL) != 0) return;
    cudaFree(loan->memory);
    delete loan;
}

void delete_view(epcomm_cuda_view* view) { let_go(static_cast<epcomm_cuda_loan*>(view->context)); }

}  // namespace

extern "C" {

epcomm_cuda_loan* epcomm_cuda_loan_open(void* memory, int32_t device) {
    auto* loan = new (std::nothrow) epcomm_cuda_loan();
    if (loan == nullptr) return nullptr;
    loan->memory = memory;
    loan->holders = 1;
    for (epcomm_cuda_view& view : loan->views) {
        view.device_type = device < 0 ? 1 : 2;  // kDLCPU, kDLCUDA
        view.device = device < 0 ? 0 : device;
        view.lanes = 1;
        view.shape = view.extents;
        view.context = loan;
        view.destroy = delete_view;
    }
    return loan;
}

void epcomm_cuda_loan_lend(epcomm_cuda_view* view) {
    auto* loan = static_cast<epcomm_cuda_loan*>(view->context);
    __atomic_add_fetch(&loan->holders, 1, __ATOMIC_ACQ_REL);
}

void epcomm_cuda_loan_close(epcomm_cuda_loan* loan) { let_go(loan); }

}  // extern "C"
