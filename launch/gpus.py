"""Print "GPUs SMs CUDA": GPUs the driver shows, SMs of the first, newest CUDA it can run (12, 13).

Asks the driver alone, without making a context, so that no process of CUDA MPS is needed and no
memory of a GPU is taken. Prints "0 0 0" where there is no driver or no GPU.
"""

import ctypes

_SM_COUNT = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT


def main() -> None:
    count, sms, version = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        print("0 0 0")
        return
    if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value:
        cuda.cuDriverGetVersion(ctypes.byref(version))
        cuda.cuDeviceGetAttribute(ctypes.byref(sms), _SM_COUNT, 0)
    print(count.value, sms.value, version.value // 1000)


if __name__ == "__main__":
    main()
