"""The CPU back end over emulated mlx5 NICs: the same bytes as the oracle's, whatever they do."""

import pytest
from harness import Case, check, make_buffer

FABRIC = "proxy/emulated"
#: World sizes and ranks per node.
SHAPES = [(8, 4), (6, 2), (3, 1)]
CASES = {
    "bf16": {},
    "fp8 to experts": {"quantize": "fp8", "layout": "expert", "alignment": 8},
    "skewed, logfmt": {"routing": "skewed", "hidden": 256, "wire": "logfmt10"},
}
FAULTS = "delay=300 late_fetch=200 lost_doorbell=300 pieces=200 late_completion=200"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("size", "shape"), SHAPES)
def test_oracle_equality(world, size, shape, name):
    comm = world(size)
    check(comm, Case(shape, **CASES[name]), fabric=FABRIC)


@pytest.mark.parametrize("options", ["early_fetch=1", "slow_plane=0 slow_us=300"])
def test_options_that_must_not_show(world, options):
    """Requests read all at once, or every message late."""
    check(world(4), Case(2, tokens=(13, 40)), fabric=f"{FABRIC} {options}")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_faults_that_must_not_show(world, seed):
    """Messages late and out of order between channels, doorbells lost, bytes in pieces."""
    comm = world(4)
    fabric = f"{FABRIC} {FAULTS} seed={seed}"
    with make_buffer(comm, Case(2, tokens=(13, 40)), fabric=fabric) as buffer:
        for turn in range(8):
            check(comm, Case(2, tokens=(13, 40), seed=turn), buffer)


def test_unknown_option_is_named(world):
    comm = world(2)
    with pytest.raises(Exception, match='"speed=11" is not one of rate='):
        make_buffer(comm, Case(1), fabric=f"{FABRIC} speed=11")
