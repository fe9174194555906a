"""The GPU-resident engine of the emulated NIC, its kernel run on the host (tests/emulation).

The same list of tests as for the host engine, a 32nd of a warp for each coroutine. Not tested here:
memory order, and speed; tests/jobs/test_resident_nic.py runs it on a GPU.
"""

import native_programs
import pytest

LINKED = [*native_programs.KERNELS_ON_THE_HOST, *native_programs.library("emulated")]
PROGRAMS = {
    "emulated_landings": LINKED,
    "emulated_lanes": LINKED,
    "emulated_offers": LINKED,
    "emulated_requests": LINKED,
    "emulated_errors": LINKED,
    "emulated_overlaps": LINKED,
    "emulated_line": LINKED,
    "emulated_schedules": LINKED,
    "emulated_wrong_writers": LINKED,
    "emulated_threads": LINKED,
    "ibgda_fabric": LINKED,
    "proxied_nics": [
        *LINKED,
        *(
            str(native_programs.ROOT / "csrc/fabric" / name)
            for name in ("end.cc", "posting.cc", "proxy.cc", "transport.cc")
        ),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resident")


@pytest.mark.parametrize(("program", "name"), native_programs.all_tests(PROGRAMS))
def test_resident_nic(folder, program, name):
    native_programs.run(native_programs.build(folder, program, PROGRAMS[program]), name)
