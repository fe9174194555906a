"""A fabric's error record in words."""

import numpy as np
import pytest

from epcomm.fabric.abi import constants, dtypes
from epcomm.fabric.fabric import describe_error
from epcomm.topology import Topology


@pytest.mark.parametrize(
    ("op", "words"),
    [
        ("PUT_SIGNAL", "a reason (put_signal of 4096 bytes to rank 3, node 1, channel 2, "),
        # Found without an operation, as what a network card reports.
        ("NOOP", "a reason (to rank 3, node 1, channel 2, "),
    ],
)
def test_an_error_names_the_peer_and_the_operation_if_there_was_one(op, words):
    error = np.zeros((), dtypes["error"])
    error["status"], error["op"], error["text"] = constants["TRANSPORT"], constants[op], b"a reason"
    error["peer"], error["channel"], error["bytes"] = 1, 2, 4096
    error["queue_pair"], error["vendor"] = 257, 751
    told = describe_error(error[()], Topology(1, (0, 0, 1, 1)))
    assert words + "queue pair 257, vendor code 751)" in str(told)
    assert told.ranks == (3,)
