"""What a modelled network says it sent: numbers that measurements are made of."""

import numpy as np
import pytest
from ranks import IN, OUT, End, run_ranks

from epcomm.fabric.abi import Place

pytestmark = pytest.mark.timeout(120)

_RATE, _LATENCY_NS = 2, 3_000_000
_LONG, _SHORT = 100_000, 1024
_LANE = 1


def _send(end, peer, sizes):
    for nbytes in sizes:
        end.fabric.put_signal((peer, _LANE), Place(IN, 0), Place(OUT, 0), nbytes, end.rank)
    end.fabric.flush(_LANE, 20.0)


def _counted(bootstrap):
    options = f"rate={_RATE} latency_ns={_LATENCY_NS}"
    end = End(bootstrap, "emulated", options)
    peer = 1 - end.rank
    # Something to forget, and shorter than data: an announcement.
    _send(end, peer, [_LONG, _SHORT])
    end.fabric.count(restart=True)
    nothing = end.fabric.count()
    _send(end, peer, [_SHORT])
    short = end.fabric.count(restart=True)
    _send(end, peer, [_SHORT, _LONG, _LONG])
    both = end.fabric.count()
    bootstrap.barrier()
    end.fabric.close()
    return nothing, short, both


def _wire(line, nbytes):
    return nbytes + -(-nbytes // int(line["packet_bytes"])) * int(line["header_bytes"])


def test_counts_begin_again_and_times_are_those_of_data(tmp_path):
    for nothing, short, both in run_ranks(_counted, 2, tmp_path):
        assert nothing["messages"] == nothing["data_arrive_ns"] == nothing["data_depart_ns"] == 0
        # A message and its signal, an atomic operation of 8 bytes.
        assert short["messages"] == 2
        assert short["payload_bytes"] == _SHORT + 8
        assert short["data_arrive_ns"] == 0
        assert (both["messages"], both["payload_bytes"]) == (6, _SHORT + 2 * _LONG + 3 * 8)
        sizes = [_SHORT, _LONG, _LONG, 8, 8, 8]
        assert both["wire_bytes"] == sum(_wire(both, nbytes) for nbytes in sizes)
        assert (both["bytes_per_ns"], both["latency_ns"]) == (_RATE, _LATENCY_NS)
        assert both["num_nics"] == 1
        span = int(both["data_arrive_ns"]) - int(both["data_depart_ns"])
        assert span >= _LATENCY_NS + 2 * _wire(both, _LONG) / _RATE


def _uncounted(bootstrap):
    end = End(bootstrap, "local", "")
    counted = end.fabric.count()
    bootstrap.barrier()
    end.fabric.close()
    return counted


def test_network_that_is_not_modelled_has_no_counts(tmp_path):
    assert run_ranks(_uncounted, 2, tmp_path) == [None, None]


def _clocks(bootstrap):
    end = End(bootstrap, "emulated", f"rate={_RATE} latency_ns={_LATENCY_NS}")
    peer = 1 - end.rank
    if end.rank == 0:
        _send(end, peer, [_LONG])
    else:
        end.await_signal(0, 1)
        _send(end, peer, [_LONG])
    counted = end.fabric.count()
    bootstrap.barrier()
    end.fabric.close()
    return int(counted["data_depart_ns"]), int(counted["data_arrive_ns"])


def test_ranks_count_on_one_clock(tmp_path):
    (first, landed), (answer, _) = run_ranks(_clocks, 2, tmp_path)
    # The answer leaves after what it answers has arrived.
    assert np.diff([first, landed, answer]).min() > 0
