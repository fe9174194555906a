// The self-test's producer on the host; the kernel is in ibgda_probe.cu.

#include "ibgda_probe.h"

extern "C" void epcomm_fabric_measure_ibgda(const epcomm_ibgda_probe* probe) {
    epcomm::fabric::run_probe(*probe);
}
