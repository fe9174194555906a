"""The benchmark's numbers: floor, rates, and that losing rows are printed too."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.floor import COPY_BYTES, least_bytes
from benchmarks.measure import Timing
from benchmarks.options import parse
from benchmarks.plot import plot
from benchmarks.report import print_result, print_sweep
from benchmarks.run_shape import Result
from epcomm.traffic import LinkBytes, LinkTraffic, Traffic


def _timing(case: str, step: str, seconds: float) -> Timing:
    return Timing(case, step, np.full((3, 2), seconds), {"pack": 0.75, "send": 0.25})


def _result() -> Result:
    arguments = ["--ranks", "2", "--nodes", "2", "--tokens", "100", "--hidden", "1024"]
    shape = parse(arguments).shapes[0]
    traffic = Traffic(
        LinkTraffic(3, 5_000_000, 0),
        LinkTraffic(1, 7_000_000, 1_000_000),
        alternatives={"per_rank": LinkBytes(0, 9_000_000)},
    )
    return Result(
        shape=shape,
        label="tokens 100",
        timings=[
            _timing("epcomm", "dispatch", 0.020),
            _timing("epcomm", "combine", 0.050),
            _timing("epcomm", "combine in place", 0.040),
            _timing("flat MPI_Alltoallv", "dispatch", 0.030),
            _timing("flat MPI_Alltoallv", "combine", 0.025),
            _timing("copy", "copy", 0.5),
        ],
        rows_R=[150, 100],
        ranks_per_token=1.25,
        nodes_per_token=1.25,
        traffic_R={"dispatch": [traffic, traffic], "combine": [traffic, traffic]},
    )


def test_the_floor_counts_every_byte_once() -> None:
    result = _result()
    # 2 x 100 tokens read as BF16; 250 rows written as FP8 with 8 float32 scales.
    assert least_bytes(result.shape, "dispatch", 250) == 200 * 2048 + 250 * (1024 + 32)
    assert least_bytes(result.shape, "combine", 250) == (200 + 250) * 2048
    assert result.copy_rate == pytest.approx(2 * 2 * COPY_BYTES / 0.5)
    assert result.floor_seconds("combine") == pytest.approx(450 * 2048 / result.copy_rate)
    bf16 = replace(result.shape, dispatch_format="bf16")
    assert least_bytes(bf16, "dispatch", 250) == (200 + 250) * 2048


def test_the_rate_counts_the_same_bytes_for_everyone() -> None:
    result = _result()
    for timing in result.alternatives("dispatch").values():
        rate = result.gigabytes_per_second(timing)
        assert rate * timing.seconds == pytest.approx(250 * 2 * 1024 / 1e9)


def test_tables_show_every_way_and_the_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(_result())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    times = {" ".join(line[:-6]): line[-6:] for line in lines if line and line[-1].endswith("%")}
    assert times["epcomm in place"][0] == "40.00"
    assert times["epcomm in place"][4] == "0.80"
    # Dispatch comes first, so combine's row is the one left: the one epcomm loses.
    assert times["flat MPI_Alltoallv"][0] == "25.00"
    assert times["flat MPI_Alltoallv"][4] == "0.50"
    assert ["dispatch:", "epcomm", "5.00", "5.00", "7.00", "7.00", "1.00"] in lines


def test_sweep_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [_result(), replace(_result(), label="tokens 200")]
    print_sweep(results)
    assert capsys.readouterr().out.count("tokens 200") == 2
    numbers = json.loads(json.dumps(results[0].as_dict()))
    assert numbers["floor_seconds"]["dispatch"] == results[0].floor_seconds("dispatch")
    assert len(numbers["timings"]) == 5
    plot(results, str(tmp_path / "x.svg"), "title")
    assert "combine" in (tmp_path / "x.svg").read_text()
