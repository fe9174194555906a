"""The GPU benchmark without a GPU: its command line, its floor, its checks on the CPU back end."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.gpu.check import check, check_every_row, check_sums
from benchmarks.gpu.exchange import FORMS, Exchange
from benchmarks.gpu.figures import Figure, Machine, Table, least_bytes
from benchmarks.gpu.options import CASES, Gpus, Setting, default_settings, parse
from benchmarks.verify import VerificationError

H200 = Gpus(1, 132)
FORMS_WITHOUT = ("BF16", "scales")  # rows as they are have no scales


def test_defaults_are_the_three_settings_of_the_table() -> None:
    options = parse([], H200)
    assert [str(setting) for setting in options.settings] == ["8x16", "8x4", "4x24"]
    assert options.cases == ["table"]
    assert options.ranks == 8
    assert (options.shape.tokens, options.shape.hidden, options.shape.topk) == (4096, 7168, 8)


def test_default_settings_shrink_to_smaller_gpus_and_spread_over_several() -> None:
    assert default_settings(Gpus(1, 46)) == [Setting(8, 5), Setting(8, 4), Setting(4, 11)]
    assert default_settings(Gpus(1, 32)) == [Setting(8, 4), Setting(4, 8)]  # 8 x 4 once
    assert default_settings(Gpus(8, 132)) == default_settings(None)


@pytest.mark.parametrize("gpus", [H200, Gpus(1, 46), Gpus(2, 108), Gpus(3, 132)])
def test_sweep_has_only_what_fits(gpus: Gpus) -> None:
    options = parse([], gpus)
    swept = options.swept(gpus)
    assert len(set(swept)) == len(swept)
    for setting in swept:
        on_a_gpu = -(-setting.ranks // gpus.count)
        assert on_a_gpu * setting.sms <= gpus.sms
    assert Setting(4, 24) in parse([], H200).swept(H200)
    assert Setting(8, 24) not in parse([], H200).swept(H200)


def test_all_cases_run_in_their_order_and_once() -> None:
    assert parse(["--cases", "all"], H200).cases == list(CASES)
    assert parse(["--cases", "graph", "table", "graph"], H200).cases == ["table", "graph"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--settings", "8x17"], "at most 16 SMs for each of 8 ranks"),
        (["--settings", "8"], "RANKSxSMS"),
        (["--settings", "0x4"], "RANKSxSMS"),
        (["--settings", "3x4"], "--experts 256 does not divide among 3 ranks; 258 would"),
        (["--settings", "8x4", "6x4"], "does not divide among 6 ranks; 264 would"),
        (["--tokens", "0"], "at least 1"),
        (["--cases", "nothing"], "nothing"),
    ],
)
def test_nonsense_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(arguments, H200)
    assert words in capsys.readouterr().err


class _Alone:
    """What the benchmark asks of a communicator, for one rank that is a process group."""

    rank = 0

    def __init__(self, group: Any) -> None:
        self.group = group

    def allgather(self, item: Any) -> list[Any]:
        return [item]

    def Barrier(self) -> None:
        pass


@pytest.fixture
def exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Exchange]:
    """An exchange of one rank on the CPU back end."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    from benchmarks.gpu import exchange as module

    make = module.Buffer
    monkeypatch.setattr(module, "Buffer", lambda comm, **given: make(comm.group, **given))
    arguments = ["--settings", "1x4", "--tokens", "9", "--hidden", "272", "--experts", "8"]
    shape = parse([*arguments, "--topk", "2"]).shape
    with Exchange(_Alone(dist.group.WORLD), shape, 4, device="cpu") as made:
        yield made
    dist.destroy_process_group()


def test_right_results_pass(exchange: Exchange) -> None:
    check(exchange)


@pytest.mark.parametrize(
    ("form", "part"),
    [(form, part) for form in FORMS for part in ("x", "scales") if (form, part) != FORMS_WITHOUT],
)
def test_one_wrong_byte_of_any_row_is_found(exchange: Exchange, form: Any, part: str) -> None:
    received = exchange.first(form, 0)
    check_every_row(exchange, form, received)
    getattr(received, part).view(torch.uint8)[5, 3] ^= 1
    with pytest.raises(VerificationError, match=r"1 of 9 rows differ"):
        check_every_row(exchange, form, received)


def test_other_input_of_the_pair_in_turn_is_another(exchange: Exchange) -> None:
    for form in FORMS:
        with pytest.raises(VerificationError, match="rows differ"):
            check_every_row(exchange, form, exchange.cached(form, 1))


def test_wrong_or_missing_sums_are_found(exchange: Exchange) -> None:
    factors = [exchange.factor(0)]
    sums = exchange.combine(0).x
    check_sums(exchange, sums, factors)
    with pytest.raises(VerificationError, match="9 of 9 rows differ"):
        check_sums(exchange, sums, [1.5])
    sums[4, 7] = float("nan")
    with pytest.raises(VerificationError, match="1 of 9 rows differ"):
        check_sums(exchange, sums, factors)


def test_floor_counts_each_byte_once(exchange: Exchange) -> None:
    rows, tokens, hidden = exchange.copies, 9, 272
    bf16, fp8 = 2 * hidden, hidden + 4 * 3
    assert least_bytes(exchange, "BF16") == tokens * bf16 + rows * bf16
    assert least_bytes(exchange, "FP8 pair") == tokens * fp8 + rows * fp8
    assert least_bytes(exchange, "BF16 to FP8") == tokens * bf16 + rows * fp8
    assert least_bytes(exchange, None) == rows * bf16 + tokens * bf16


def test_share_and_rate_follow_from_bytes_and_time() -> None:
    figure = Figure("table", 2, 5, 9, "uniform", "call", 2e-6, 8000, 1e-6)
    assert figure.share == 0.5
    assert figure.rate == pytest.approx(4.0)
    assert "50%" in str(figure)
    assert "0.4" in str(figure)  # GB/s of an SM


@pytest.mark.parametrize("more", [{}, {"us_more": 12.5}])
def test_markdown_has_a_cell_for_every_heading(
    exchange: Exchange, more: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Table(Machine(1e12, 1), prints=True)
    for name in ("one", "two"):
        out.add("sms", exchange, name, 1e-6, 1000, **more)
    capsys.readouterr()
    out.markdown("sms")
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(lines) == (4 if more else 3)
    assert len({line.count("|") for line in lines}) == 1
    assert "1 (0%" in lines[2]
    assert ("12.5" in lines[2]) == bool(more)
