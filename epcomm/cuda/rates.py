"""What GPUs move, as all ranks of a buffer know it.

Measured once per process and GPU. Where ranks share a GPU its first rank measures, so that nothing
else disturbs it, while the others wait to be told; so all of them reckon with the same numbers.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ..bootstrap import Bootstrap, raise_together


@dataclass(frozen=True)
class Rates:
    """What a GPU moves, in bytes per second.

    Attributes:
        blocks: numbers of thread blocks tried, ascending.
        moved: bytes that so many blocks read and write in the GPU's own memory; the last is the
            rate of the memory itself.
        link: bytes that GPUs of this host store into another's memory, the slowest of them; None
            where only one takes part.
    """

    blocks: tuple[int, ...]
    moved: tuple[float, ...]
    link: float | None = None

    @property
    def memory(self) -> float:
        """The rate no number of blocks exceeds."""
        return max(self.moved)

    def at(self, blocks: int) -> float:
        """Rate of a number of blocks: straight lines between those tried, and through zero."""
        points = [(0, 0.0), *zip(self.blocks, self.moved, strict=True)]
        for (low, slow), (high, fast) in itertools.pairwise(points):
            if blocks <= high:
                return slow + (fast - slow) * (blocks - low) / (high - low)
        return points[-1][1]


class Probe(Protocol):
    """Measures one GPU; see :class:`epcomm.cuda.calibrate.GpuProbe`."""

    def memory(self, block_counts: tuple[int, ...]) -> tuple[float, ...]:
        """Bytes read and written per second for every number of blocks."""

    def offer(self) -> bytes:
        """Memory for another GPU to write to."""

    def map(self, offered: bytes) -> None:
        """Reach what another GPU offers."""

    def link(self) -> float:
        """Bytes stored there per second."""

    def unmap(self) -> None:
        """Let go of it."""

    def withdraw(self) -> None:
        """Free what was offered."""


@dataclass(frozen=True)
class Place:
    """Where a rank runs.

    Attributes:
        gpu: the same exactly for ranks that share a GPU.
        host: where that is.
        sms: the GPU has.
    """

    gpu: str
    host: str
    sms: int


#: Parts of a GPU's SMs that are tried.
_PARTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0)

#: By GPU and number of GPUs on its host: measured by this process, or told to it.
_known: dict[tuple[str, int], Rates] = {}


def block_counts(sms: int) -> tuple[int, ...]:
    """Numbers of blocks to try, ascending; the last is all SMs."""
    return tuple(sorted({max(1, round(sms * part)) for part in _PARTS}))


def agree_on_rates(bootstrap: Bootstrap, place: Place, probe: Probe) -> Rates:
    """Rates of this rank's GPU, the same on all ranks that share it. Collective.

    Raises:
        RuntimeError, MemoryError, OSError: a measurement failed here.
        PeerError: on another rank.
    """
    places = bootstrap.allgather(place)
    leaders = _leaders(places, place.host)
    here = leaders[place.gpu]
    key = (place.gpu, len(leaders))
    knowledge = bootstrap.allgather(_known.get(key))
    told: Rates | None = next(
        (
            rates
            for where, rates in zip(places, knowledge, strict=True)
            if where.gpu == place.gpu and rates
        ),
        None,
    )
    # Ranks that know take part where others must measure: their GPU is one end of a link.
    if all(bootstrap.allgather(told is not None)):
        assert told is not None
        _known[key] = told
        return told
    counts = block_counts(place.sms)
    measures = bootstrap.rank == here
    curves = _step(bootstrap, (lambda: probe.memory(counts)) if measures else None)
    link = None
    if any(len(_leaders(places, where.host)) > 1 for where in places):
        link = _link_rate(bootstrap, list(leaders.values()), probe)
    _known[key] = Rates(counts, curves[here], link)
    return _known[key]


def _leaders(places: list[Place], host: str) -> dict[str, int]:
    """The first rank of every GPU of a host."""
    first: dict[str, int] = {}
    for rank, place in enumerate(places):
        if place.host == host:
            first.setdefault(place.gpu, rank)
    return first


def _step(bootstrap: Bootstrap, action: Callable[[], Any] | None) -> list[Any]:
    """Let some ranks act, then exchange what came of it; a failure is everyone's. Collective."""
    result: Any = None
    error: Exception | None = None
    try:
        if action is not None:
            result = action()
    except (RuntimeError, MemoryError, OSError) as caught:
        error = caught
    raise_together(bootstrap, error)
    return bootstrap.allgather(result)


def _link_rate(bootstrap: Bootstrap, leaders: list[int], probe: Probe) -> float | None:
    """Let every GPU of a host store into the next one at once. Collective over all hosts.

    Every step ends in an exchange, so that memory outlives its mapping by another GPU.

    Returns:
        The slowest rate, or None where this host has one GPU.
    """
    if len(leaders) < 2 or bootstrap.rank not in leaders:
        rates = [_step(bootstrap, None) for _ in range(5)][2]
    else:
        following = leaders[(leaders.index(bootstrap.rank) + 1) % len(leaders)]
        offered = _step(bootstrap, probe.offer)
        _step(bootstrap, lambda: probe.map(offered[following]))
        rates = _step(bootstrap, probe.link)
        _step(bootstrap, probe.unmap)
        _step(bootstrap, probe.withdraw)
    return min(rates[rank] for rank in leaders) if len(leaders) > 1 else None
