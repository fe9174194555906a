"""Rings, proxy threads and the receive protocol: the C++ tests of tests/native, one by one."""

import native_programs
import pytest

LIBRARY = native_programs.library("host", "fabric", "emulated")
#: Its test writes the requests of the transport `emulated`.
WRONG = [source for source in LIBRARY if not source.endswith("/posting.cc")]
PROGRAMS = {
    "rings": [],
    "proxies": LIBRARY,
    "model": LIBRARY,
    "direct": LIBRARY,
    "wrong_posting": WRONG,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("native")


@pytest.mark.parametrize(("program", "name"), native_programs.all_tests(PROGRAMS))
def test_native(folder, program, name):
    native_programs.run(native_programs.build(folder, program, PROGRAMS[program]), name)
