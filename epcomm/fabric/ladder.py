"""Which fabric carries chunks between nodes: the fastest one that every rank can use.

A rank finds out what it can use by trying: it makes two ends of a fabric over its own network card,
connects them with each other and ends them again. What that meets, with the remedy, is the reason
against a rung. One exchange makes all ranks choose alike.
"""

import logging
from collections.abc import Callable, Mapping

from ..bootstrap import Bootstrap, this_host
from ..errors import FabricError
from ..topology import Topology
from .abi import constants, transports
from .fabric import Fabric, FabricOptions, RegionMemory
from .twins import Twin, run_twins

_LOGGER = logging.getLogger("epcomm")
#: Seconds in which two ends of one process find each other.
_PATIENCE = 60.0
_IBGDA, _VERBS, _LOCAL = "ibgda", "proxy/verbs", "proxy/local"
#: What carries chunks between GPUs of several nodes, by the fabric's name. The emulated ones are
#: for tests and comparisons, never chosen: the last is the one before it with proxy threads between
#: kernels and network cards.
TRANSPORTS = {
    _IBGDA: "mlx5",
    _VERBS: "verbs",
    _LOCAL: "local-cuda",
    "emulated": "emulated-cuda",
    "proxy/emulated": "emulated-cuda-proxy",
}
#: Those over network cards, from the fastest; with what the transport is asked for when nobody
#: names it. By proxy only if a card reaches the GPU's memory: through a copy it would be slow.
_OVER_CARDS = {_IBGDA: "", _VERBS: "signal=atomic"}


def pick(reasons: Mapping[str, str]) -> tuple[str, str]:
    """The first fabric that nothing is said against, and the choice in one line.

    Args:
        reasons: why not, by fabric from the fastest; empty for one that works.

    Returns:
        Its name, "" if there is none; "name: why not a faster one; ...".
    """
    skipped: list[str] = []
    for fabric, why in reasons.items():
        if not why:
            return fabric, _line(fabric, skipped)
        skipped.append(f"{fabric}: {why}")
    return "", _line("none", skipped)


def _line(fabric: str, skipped: list[str]) -> str:
    return f"{fabric} ({'; '.join(skipped)})" if skipped else fabric


def attempt(transport: str, arguments: str, region: RegionMemory) -> str:
    """Why a transport cannot be used by this rank; empty if it can. Local.

    Args:
        transport: as in FabricOptions.
        arguments: likewise.
        region: memory of the kind that is to be sent.
    """
    if transport not in transports:
        return f"this build of the library has no transport {transport}"
    options = FabricOptions(transport, arguments, timeout=_PATIENCE)

    def make_end(twin: Twin) -> None:
        regions = {constants["SIGNALS"]: region}
        fabric = Fabric(twin, Topology(twin.rank, (0, 1)), options, regions)
        try:
            twin.barrier()
        finally:
            fabric.close()

    try:
        run_twins(_PATIENCE, make_end)
    except Exception as error:  # whatever it is, this transport is not taken
        return str(error) or type(error).__name__
    return ""


def choose(bootstrap: Bootstrap, try_here: Callable[[str], str]) -> str:
    """The fabric between GPUs that all ranks take. Collective.

    Rank 0 logs the choice and why no faster one was taken, as "epcomm" of ``logging``: a warning
    where ranks of several machines could do better, else for information.

    Args:
        bootstrap: of the world.
        try_here: why this rank cannot use a fabric over network cards; empty if it can.

    Raises:
        FabricError: there is none; on every rank.
    """
    mine = {fabric: try_here(fabric) for fabric in _OVER_CARDS}
    everyone = bootstrap.allgather((mine, this_host()))
    reasons = {fabric: _first_reason([said[fabric] for said, _ in everyone]) for fabric in mine}
    machines = len({host for _, host in everyone})
    reasons[_LOCAL] = "" if machines == 1 else f"the ranks are on {machines} machines"
    chosen, line = pick(reasons)
    if not chosen:
        raise FabricError(f"no fabric carries data between the nodes' GPUs: {line}")
    if bootstrap.rank == 0:
        better = chosen != _IBGDA and machines > 1
        _LOGGER.log(logging.WARNING if better else logging.INFO, "epcomm: fabric %s", line)
    return chosen


def _first_reason(whys: list[str]) -> str:
    """What the first rank with a reason says."""
    for rank, why in enumerate(whys):
        if why:
            return why if all(other == why for other in whys) else f"rank {rank}: {why}"
    return ""


def resolve(
    bootstrap: Bootstrap,
    topology: Topology,
    fabric: str,
    make_region: Callable[[], RegionMemory],
) -> tuple[str, str]:
    """What carries chunks between GPUs: the transport and its options. Collective.

    Args:
        bootstrap: of the world.
        topology: of the world.
        fabric: Buffer's argument of that name, with options.
        make_region: a little of this rank's GPU, to try with.

    Raises:
        FabricError: "auto", and there is no fabric.
    """
    # First, so that the user's wins.
    place = f"local_rank={topology.local_rank} "
    name, _, arguments = fabric.partition(" ")
    if name == "auto":
        region = make_region()

        def try_here(rung: str) -> str:
            how = place + _OVER_CARDS[rung]
            return attempt(TRANSPORTS[rung], how, region)

        name = choose(bootstrap, try_here)
        arguments = _OVER_CARDS.get(name, "")
    if name in _OVER_CARDS:
        arguments = place + arguments
    return TRANSPORTS[name], arguments.strip()
