"""The GPU benchmark between nodes, without a GPU: command line, arithmetic, what tables say."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu.crossing import Crossing, count_records
from benchmarks.gpu.figures import Figure, Machine, Table
from benchmarks.gpu.goals import Goal, Goals
from benchmarks.gpu.network import Line, is_modelled, name_of
from benchmarks.gpu.nodes_cases import Between, LineFigure, Phase, Timed, judge_line
from benchmarks.gpu.nodes_compare import compare
from benchmarks.gpu.nodes_options import CASES, LINE_FABRICS, LINE_SMS, Setting, parse
from benchmarks.gpu.nodes_triggers import chunk_bytes, numbers_of_ranks
from benchmarks.gpu.options import Gpus
from benchmarks.triggers import Sweep, feed
from epcomm.cuda.nics import nic_sms
from epcomm.formats.wire import WireFormat
from epcomm.native import dispatch_record

H200 = Gpus(1, 132)
ROOT = Path(__file__).parents[2]


# The command line --------------------------------------------------------------------------


def test_defaults_are_the_cases_of_the_tables() -> None:
    options = parse(["--nodes", "2", "4"], H200)
    assert options.cases == list(CASES)
    assert options.ranks == 8
    two, four = options.on(2), options.on(4)
    assert (two.ranks_per_node, two.groups, two.topk_groups) == (4, 2, 2)
    assert (four.ranks_per_node, four.groups, four.topk_groups) == (2, 4, 4)
    assert (two.tokens, two.hidden, two.topk, two.experts) == (4096, 7168, 8, 256)
    proxies = [Setting(n, sms, "proxy/local") for n in (2, 4) for sms in (16, 12)]
    assert options.settings("proxy", H200) == proxies
    lines = options.settings("line", H200)
    assert [(s.nodes, s.sms) for s in lines] == [(n, sms) for n in (2, 4) for sms in LINE_SMS]
    assert all("rate=50 latency_ns=2000" in s.fabric for s in lines)


def test_staging_is_given_in_mebibytes() -> None:
    assert parse([]).staging is None
    assert parse(["--staging", "24"]).staging == 24 * 2**20


def test_gate_reaches_at_most_four_nodes() -> None:
    assert parse(["--nodes", "8"]).on(8).topk_groups == 4


@pytest.mark.parametrize("gpus", [H200, Gpus(1, 46), Gpus(2, 108), Gpus(8, 132)])
def test_defaults_fit_with_their_nics(gpus: Gpus) -> None:
    options = parse(["--nodes", "2", "4"], gpus)
    settings = [s for case in CASES for s in options.settings(case, gpus)]
    assert settings
    on_a_gpu = -(-options.ranks // gpus.count)
    for setting in settings:
        assert on_a_gpu * (setting.sms + nic_sms(setting.fabric)) <= gpus.sms
    most = max(setting.sms + nic_sms(setting.fabric) for setting in settings)
    assert options.most_sms(gpus) == most


def test_a_timeline_is_of_one_setting() -> None:
    options = parse(["--nodes", "2", "--cases", "line", "--timeline", "a.json"], H200)
    assert options.timeline == "a.json"
    assert parse(["--nodes", "2"], H200).timeline is None
    with pytest.raises(SystemExit):  # triggers have none
        parse(["--nodes", "2", "--cases", "triggers", "--timeline", "a.json"], H200)


def test_launcher_is_told_ranks_and_sms_of_rank_and_nic() -> None:
    arguments = ["1", "132", "--nodes", "2", "--cases", "line", "--sms", "4", "8"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.nodes_options", *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=60,
    )
    assert done.stdout.split() == ["8", str(8 + nic_sms(LINE_FABRICS[0]))]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "3"], "--nodes 3: expected 2 or more that divide --ranks 8"),
        (["--nodes", "1"], "--nodes 1"),
        (["--sms", "17", "--cases", "proxy"], "at most 16 fit for each of 8 ranks"),
        (["--sms", "16", "--cases", "line"], "--sms 16 beside 4 of its NICs"),
        (["--fabric", "emulated blocks=0"], "--fabric: blocks: expected SMs"),
        (["--experts", "28"], "--experts 28 does not divide"),
        (["--experts", "8", "--nodes", "8"], "finds 4 of --experts 8 on 4 of 8 nodes"),
        (["--ranks", "200", "--experts", "400"], "no SM is left"),
        (["--cases", "nothing"], "nothing"),
    ],
)
def test_nonsense_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(arguments, H200)
    assert words in capsys.readouterr().err


def test_what_was_asked_for_replaces_what_a_case_has() -> None:
    options = parse(["--sms", "3", "5", "--fabric", "emulated blocks=4", "proxy/local"], H200)
    expected = [Setting(2, sms, f) for f in ("emulated blocks=4", "proxy/local") for sms in (3, 5)]
    assert options.settings("line", H200) == options.settings("proxy", H200) == expected
    assert options.settings("triggers", H200) == []


# Records, bytes, rates ---------------------------------------------------------------------

LINE = Line(50e9, 2e-6, 4096, 80)


def test_line_counts_headers_of_every_packet() -> None:
    assert LINE.wire_bytes(0) == 0
    assert LINE.wire_bytes(1) == 81
    assert LINE.wire_bytes(4096) == 4176
    assert LINE.wire_bytes(4097) == 4097 + 160
    assert LINE.wire_bytes(np.array([0, 4097])).tolist() == [0, 4257]
    assert LINE.share(25_000, 1e-6) == pytest.approx(0.5)
    assert LINE.ideal_seconds(50_000) == pytest.approx(1e-6 + 4e-6)


def test_line_of_several_nics_is_as_fast_as_all_of_them() -> None:
    fields = {"num_nics": 4, "bytes_per_ns": 25, "latency_ns": 1500}
    fields |= {"packet_bytes": 2048, "header_bytes": 30}
    traffic = np.zeros((), [(name, np.int64) for name in fields])
    for name, value in fields.items():
        traffic[name] = value
    assert Line.of(traffic) == Line(100e9, 1.5e-6, 2048, 30)


def test_one_record_crosses_for_each_token_and_other_node() -> None:
    shape = parse(["--ranks", "4", "--experts", "8", "--topk", "2", "--nodes", "2"]).on(2)
    # Experts 0-3 are on node 0, 4-7 on node 1.
    topk_idx = torch.tensor([[0, 1], [3, 4], [4, 7], [-1, 6], [-1, -1]])
    assert count_records(topk_idx, shape, 0).tolist() == [0, 3]
    assert count_records(topk_idx, shape, 1).tolist() == [0, 3]
    assert count_records(topk_idx, shape, 2).tolist() == [2, 0]


def _crossing() -> Crossing:
    # Nodes 0, 1, 2 of 2 ranks.
    return Crossing(np.array([[0, 5, 1], [0, 2, 2], [4, 0, 0], [9, 0, 7], [3, 3, 0], [0, 1, 0]]))


def test_records_come_back_where_they_came_from() -> None:
    crossing = _crossing()
    back = crossing.back_RN
    for node in range(3):
        for local in range(2):
            for other in range(3):
                sent = crossing.out_RN[2 * other + local, node]
                assert back[2 * node + local, other] == sent
    assert crossing.total == 37
    assert back.sum() == 37


def test_busiest_rank_counts_what_it_sends_or_gets() -> None:
    crossing = _crossing()
    plain = Line(1.0, 0.0, 1, 0)
    # Rank 3 sends 16 records; rank 1 gets 9 of them, rank 2 gets 8.
    assert crossing.busiest_bytes(10, 4, plain) == 160
    # Chunks of 4 records of 100 bytes in packets of 150: 9 records are 3 + 3 + 1 packets, 7 are
    # 3 + 2.
    assert crossing.busiest_bytes(100, 4, Line(1.0, 0.0, 150, 1)) == 1600 + 12
    assert crossing.messages(4) == 5
    # One that receives from all: the sender with the most has less.
    many = Crossing(np.array([[0, 0, 0], [7, 0, 0], [7, 0, 0]]))
    assert many.busiest_bytes(1, 64, plain) == 14
    assert many.messages(64) == 2


def test_staging_is_written_and_read_once_or_as_ranks_of_one_memory_do() -> None:
    record = dispatch_record(WireFormat.FP8, 512, 8)
    timed = Timed("call", lambda turn: None, record, row_bytes=10, least=1000)
    between = Between(None, _crossing(), None)  # type: ignore[arg-type]
    assert between.floor_bytes(timed) == 1000 + 2 * 37 * 10
    assert between.copied_bytes(timed) == 1000 + 4 * 37 * 10
    assert between.of_least_out(timed, 444.0) == pytest.approx(1.2)


def test_proxies_feed_a_chunk_for_each_trigger() -> None:
    assert feed(480_000, 1000) == pytest.approx(960.0)
    assert feed(480_000, 1000, cores=1) == pytest.approx(480.0)
    shape = parse([]).on(2)
    record = dispatch_record(WireFormat.FP8, 7168, 8).bytes
    assert chunk_bytes(shape, 64) == 64 * record


def test_trigger_sweep_has_no_more_threads_than_rings() -> None:
    assert Sweep(rings=(1, 2), threads=(1, 2, 4)).pairs() == [(1, 1), (2, 1), (2, 2)]
    assert Sweep(rings=(1, 4)).pairs() == [(1, 1), (4, 4)]
    assert numbers_of_ranks(8) == [2, 4, 8]
    assert numbers_of_ranks(6) == [2, 4, 6]
    assert numbers_of_ranks(1) == [1]


# What is said ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "at_most", "outcome"),
    [
        (94.99, False, "missed"),
        (95.0, False, "reached"),
        (95.0, True, "reached"),
        (95.01, True, "missed"),
        (None, True, "not measured"),
    ],
)
def test_goal_says_wanted_seen_and_outcome(seen: float | None, at_most: bool, outcome: str) -> None:
    goal = Goal("somewhere", "a share", 95.0, at_most, "%", seen, "8 SMs")
    assert goal.outcome == outcome
    assert f"at {'most' if at_most else 'least'} 95 %" in str(goal)
    assert str(goal).endswith(f"(8 SMs): {outcome}")
    if seen is not None:
        assert goal.sight in str(goal)
        assert (goal.sight == "95 %") == (seen == 95.0)  # a miss is never printed as the limit


def test_every_number_of_a_modelled_network_says_so() -> None:
    assert name_of("proxy/local") == "proxy/local"
    assert is_modelled("emulated rate=50")
    assert is_modelled("proxy/emulated rate=50")
    assert not is_modelled("proxy/verbs nic=emulated_0")
    figure = Figure("line", 8, 6, 9, "gate", "call", 1e-6, 10, 1e-9, nodes=4, fabric="emulated x=1")
    assert figure.label == "emulated (modelled network), 4 x 2 x 6, 9 tokens, gate"
    assert figure.as_dict()["modelled_network"]
    inside = Figure("t", 8, 6, 9, "gate", "call", 1e-6, 10, 1e-9)
    assert inside.label == "8 x 6, 9 tokens, gate"
    assert not inside.as_dict()["modelled_network"]


@pytest.mark.parametrize(
    ("late", "copier", "limit"),
    [(0.01, False, "model"), (0.02, False, "engine: messages took effect 15.0 us late"),
     (0.9, True, "copier: ")],
)  # fmt: skip
def test_what_was_the_limit_is_said(late: float, copier: bool, limit: str) -> None:
    phase = Phase(1.0, 1.0, 1.0, late, 0.0, 15e-6, copier, 9, Line(5e10, 2e-6, 4096, 80))
    assert phase.limit.startswith(limit)


def _message(fabric: str, kilobytes: float, microseconds: float, **more: float) -> Figure:
    figure = Figure("messages", 8, 6, 9, "gate", "combine", microseconds * 1e-6, 10, 1e-9)
    others = {"message KB": kilobytes} | {name.replace("_", " "): v for name, v in more.items()}
    return replace(figure, nodes=2, fabric=fabric, more=others)


def test_networks_stand_side_by_side_by_the_size_of_a_message() -> None:
    share = "data % of line"
    kernels = [_message("emulated x=1", kb, us, **{share: 90.0}) for kb, us in ((16, 20), (64, 50))]
    proxies = [
        _message("proxy/emulated x=1", 16.0, 30, **{share: 60.4, "late copies %": 0.9}),
        _message("proxy/emulated x=1", 64.0, 50, **{share: 90.0, "late copies %": 7.0}),
        _message("proxy/emulated x=1", 99.0, 70),
        _message("proxy/local", 64.0, 1),
    ]
    lines = compare(kernels + proxies)
    assert "Modelled network" in lines[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[3:]]
    assert rows[0][2:] == [
        "emulated x=1: us (of the line)",
        "proxy/emulated x=1: us (of the line)",
        "proxy/emulated x=1 over emulated x=1",
    ]
    assert rows[2:] == [
        ["2 x 4 x 6, combine", "16.0", "20 (90 %)", "30 (60 %)", "1.50"],
        ["2 x 4 x 6, combine", "64.0", "50 (90 %)", "50 (90 %, late 7 %)", "1.00"],
        ["2 x 4 x 6, combine", "99.0", "", "70", ""],
    ]
    assert compare(kernels) == compare(proxies) == []


def _judged(
    found: list[LineFigure], capsys: pytest.CaptureFixture[str], nodes: int = 2
) -> dict[str, Goal]:
    goals = Goals(Table(Machine(1e12, 1), prints=True))
    judge_line(goals, "emulated (modelled network), 2 x 4", nodes, found)
    printed = capsys.readouterr().out
    assert printed.count("wanted") == len(goals.goals) == 6
    goals.markdown()
    table = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len({line.count("|") for line in table}) == 1
    assert all("modelled network" in line for line in table[2:])
    assert [row["outcome"] for row in json.loads(json.dumps(goals.as_list()))] == [
        goal.outcome for goal in goals.goals
    ]
    return {goal.what: goal for goal in goals.goals}


def _figures(name: str, shares: dict[int, float], **more: Any) -> list[LineFigure]:
    given = {"over_ideal": 1.1, "copier": False} | more
    return [LineFigure(name, sms, share, **given) for sms, share in shares.items()]


def test_sweep_is_judged_by_its_best_row_of_few_sms(capsys: pytest.CaptureFixture[str]) -> None:
    found = _figures("dispatch FP8 pair", {2: 0.5, 4: 0.91, 8: 0.96, 12: 0.99})
    found += _figures("combine BF16", {2: 0.5, 8: 0.94, 12: 0.99}, over_ideal=1.2)
    goals = _judged(found, capsys)
    share = "line rate during the data phase, at most 8 SMs a rank"
    assert goals[f"dispatch FP8 pair, {share}"].seen == pytest.approx(96.0)
    assert goals[f"dispatch FP8 pair, {share}"].outcome == "reached"
    assert goals[f"combine BF16, {share}"].outcome == "missed"
    fewest = "SMs a rank for 90% of the line rate"
    assert goals[f"dispatch FP8 pair, {fewest}"].seen == 4
    assert goals[f"combine BF16, {fewest}"].seen == 8
    assert goals[f"combine BF16, {fewest}"].outcome == "missed"
    low = _judged(_figures("combine BF16", {2: 0.5, 4: 0.7}), capsys)
    assert low[f"combine BF16, {fewest}"].seen is None
    assert low[f"combine BF16, {fewest}"].outcome == "missed"
    assert low[f"dispatch FP8 pair, {fewest}"].outcome == "not measured"
    ideal = "whole call over bytes / rate + 2 latencies"
    assert goals[f"combine BF16, {ideal}"].outcome == "missed"
    assert goals[f"first dispatch FP8 pair, {ideal}"].outcome == "not measured"


def test_whole_calls_are_judged_by_their_best_row(capsys: pytest.CaptureFixture[str]) -> None:
    found = _figures("combine BF16", {8: 0.96}, over_ideal=1.17)
    found += _figures("combine BF16", {12: 0.97}, over_ideal=1.13)
    goals = _judged(found, capsys)
    goal = goals["combine BF16, whole call over bytes / rate + 2 latencies"]
    assert (goal.outcome, goal.seen, goal.note) == ("reached", 1.13, "12 SMs")


def test_more_nodes_need_less_of_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    goals = _judged(_figures("combine BF16", {4: 0.91}), capsys, nodes=4)
    share = "line rate during the data phase, at most 8 SMs a rank"
    assert goals[f"combine BF16, {share}"].outcome == "reached"


def test_what_is_reached_in_spite_of_a_late_copier_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    goals = _judged(_figures("combine BF16", {4: 0.99}, copier=True), capsys)
    share = "line rate during the data phase, at most 8 SMs a rank"
    goal = goals[f"combine BF16, {share}"]
    assert (goal.outcome, goal.note) == ("reached", "4 SMs, the copier was late")
