"""What only the verbs transport has: cards, addresses, options, and how they are refused."""

import time
from typing import Any

import pytest
from conftest import Transport
from ranks import IN, OUT, End, FileBootstrap, run_ranks

from epcomm.errors import FabricError, PeerError
from epcomm.fabric.abi import Place

RETRIES_EXCEEDED = 12
SOON = 20.0
pytestmark = pytest.mark.usefixtures("rdma")


def make(bootstrap: FileBootstrap, arguments: list[str]) -> Any:
    """Make a fabric; what it says of itself, or why it could not be made."""
    try:
        end = End(bootstrap, "verbs", arguments[bootstrap.rank])
    except (FabricError, PeerError) as error:
        return type(error).__name__, str(error)
    text = end.fabric.describe()
    peer = 1 - end.rank
    for channel in range(4):
        end.fabric.put_signal((peer, channel), Place(IN, 0), Place(OUT, 0), 4096, channel)
    for channel in range(4):
        end.await_signal(channel, 1)
    bootstrap.barrier()
    end.fabric.close()
    return "made", text


def test_says_what_it_chose(tmp_path):
    """A RoCE v2 address is found; level, class and size of packets are as set."""
    for what, text in run_ranks(make, 2, tmp_path, ["nic=rxe0 sl=3 tc=106 mtu=1024"] * 2):
        assert what == "made", text
        for part in ("rxe0 port 1 RoCE", "RoCE v2", "::ffff:10.77.0.1", "sl 3 tc 106", "fetch-add"):
            assert part in text, text


def test_channels_over_two_cards(rdma, tmp_path):
    if len(rdma) < 2:
        pytest.skip("needs two RDMA devices")
    for what, text in run_ranks(make, 2, tmp_path, [f"nic={rdma[0]}+{rdma[1]}"] * 2):
        assert what == "made", text
        assert all(card in text for card in rdma[:2]), text


def test_signals_as_the_side_with_less_can(tmp_path):
    """One side needs notices: both use them."""
    results = run_ranks(make, 2, tmp_path, ["", "registration=bounce"])
    for what, text in results:
        assert what == "made", text
        assert "signals by notices" in text, text


REFUSED = {
    "nic=mlx5_99": "there is no device",
    "nic=rxe0:7": "has no port 7",
    "gid=200": "no address at index 200",
    "speed=1": "expected name=value",
    "timeout=99": "an integer from 1 to 31",
    "signal=atomic registration=bounce": "atomic is not possible",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_refused_on_both_ranks_with_the_reason(arguments, tmp_path):
    """The rank that cannot says why; the other names it."""
    mine, theirs = run_ranks(make, 2, tmp_path, [arguments, ""])
    assert mine[0] == "FabricError"
    assert REFUSED[arguments] in mine[1]
    assert theirs[0] == "PeerError"
    assert "rank 0" in theirs[1]


def put_to_the_closed(bootstrap: FileBootstrap, transport: Transport) -> Any:
    end = End(bootstrap, transport.name, transport.arguments)
    bootstrap.barrier()
    if end.rank == 1:
        end.fabric.close()
    bootstrap.barrier()
    result = None
    if end.rank == 0:
        started = time.monotonic()
        end.fabric.put((1, 3), Place(IN, 0), Place(OUT, 0), 4096)
        try:
            end.fabric.flush(3, SOON)
        except FabricError as error:
            result = error.vendor, time.monotonic() - started, str(error)
        end.fabric.close()
    return result


def test_no_answer_is_an_error_after_the_retries(tmp_path):
    """The peer lives but has closed its queue pairs: nothing but the retries tells."""
    quick = Transport("verbs", "timeout=10 retries=2")
    vendor, seconds, text = run_ranks(put_to_the_closed, 2, tmp_path, quick)[0]
    assert vendor == RETRIES_EXCEEDED, text
    assert "retries exceeded" in text
    assert "channel 3" in text
    assert seconds < SOON
