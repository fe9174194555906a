"""The benchmark's command line."""

import pytest

from benchmarks.options import SWEEPS, parse


def test_defaults_describe_two_nodes_of_four_ranks() -> None:
    options = parse([])
    assert options.ranks == 8
    assert [shape.tokens for shape in options.shapes] == [4096, 128]
    assert all(shape.ranks_per_node == 4 for shape in options.shapes)
    assert all(shape.experts_per_rank == 32 for shape in options.shapes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "6", "--nodes", "4"], "--nodes 4"),
        (["--ranks", "6", "--experts", "256"], "--experts 256"),
        (["--plot", "x.pdf"], ".png or .svg"),
        (["--tokens", "0"], "at least 1"),
        (["--sweep", "nothing"], "nothing"),
    ],
)
def test_nonsense_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("sweep", SWEEPS)
def test_sweeps_vary_one_thing_and_fit_the_launched_ranks(sweep: str) -> None:
    options = parse(["--sweep", sweep, "--ranks", "8"])
    assert options.ranks == 8
    assert len(set(options.shapes)) == len(options.shapes) == len(set(options.labels)) > 1
    for shape in options.shapes:
        assert shape.ranks % shape.nodes == 0
        assert shape.experts % shape.ranks == 0


def test_rank_sweep_keeps_the_nodes_where_it_can() -> None:
    options = parse(["--sweep", "ranks", "--ranks", "6", "--nodes", "3", "--experts", "24"])
    assert [(s.ranks, s.nodes) for s in options.shapes] == [(2, 1), (4, 1), (6, 3)]
