"""One measurement: make the cases, verify them, time them, gather the numbers."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from epcomm.routing import count_destinations
from epcomm.traffic import Traffic

from .epcomm_case import EpcommCase
from .exchanges import GlooExchange, MpiExchange
from .flat import Buffers, FlatCase
from .floor import COPY_BYTES, CopyCase, least_bytes
from .measure import Case, Timing, measure
from .options import Shape
from .verify import check_flat, check_metadata, check_rows, sampled_tokens, verify_small
from .workload import Inputs, make_inputs, normal_rows

STEPS = ("dispatch", "combine")


@dataclass
class Result:
    """What was measured of one shape.

    Attributes:
        shape: what was exchanged.
        label: what distinguishes the shape from the others of the run.
        timings: of every case and step.
        rows_R: (token, rank) rows each rank received.
        ranks_per_token: distinct destination ranks of a token, mean.
        nodes_per_token: distinct destination nodes of a token, mean.
        traffic_R: of epcomm's steps, what each rank moved.

    """

    shape: Shape
    label: str
    timings: list[Timing]
    rows_R: list[int]
    ranks_per_token: float
    nodes_per_token: float
    traffic_R: dict[str, list[Traffic]]

    @property
    def rows(self) -> int:
        """(token, rank) rows of all ranks."""
        return sum(self.rows_R)

    @property
    def copy_rate(self) -> float:
        """Bytes per second, read plus written, of all ranks copying at once."""
        copies = 2 * COPY_BYTES * self.shape.ranks
        return copies / self.timing("copy", "copy").seconds

    def timing(self, case: str, step: str) -> Timing:
        """One of the timings."""
        return next(t for t in self.timings if (t.case, t.step) == (case, step))

    def alternatives(self, step: str) -> dict[str, Timing]:
        """Every way of doing a step, epcomm's first, by name."""
        return {
            timing.case + timing.step.removeprefix(step): timing
            for timing in self.timings
            if timing.step.startswith(step)
        }

    def floor_seconds(self, step: str) -> float:
        """Time of the bytes a step must read and write, at the copy rate."""
        return least_bytes(self.shape, step, self.rows) / self.copy_rate

    def gigabytes_per_second(self, timing: Timing) -> float:
        """Rate that counts each (token, rank) row once, as BF16, whatever was moved for it."""
        return self.rows * 2 * self.shape.hidden / timing.seconds / 1e9

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "label": self.label,
            "shape": asdict(self.shape),
            "rows_of_ranks": self.rows_R,
            "ranks_per_token": self.ranks_per_token,
            "nodes_per_token": self.nodes_per_token,
            "copy_bytes_per_second": self.copy_rate,
            "floor_seconds": {step: self.floor_seconds(step) for step in STEPS},
            "timings": [
                timing.as_dict() | {"gigabytes_per_second": self.gigabytes_per_second(timing)}
                for timing in self.timings
                if timing.case != "copy"
            ],
            "traffic_of_ranks": {
                step: [traffic.as_dict() for traffic in traffic_R]
                for step, traffic_R in self.traffic_R.items()
            },
        }


def _verify(
    comm: Any, shape: Shape, inputs: Inputs, case: EpcommCase, flats: list[FlatCase]
) -> None:
    """Run everything once, which also warms it up, and check what came out."""
    case.prepare("dispatch")
    case.dispatch()
    assert case.received is not None
    check_metadata(comm, shape, inputs, case)
    if shape.layout == "expert":
        case.y_MH = normal_rows(shape, comm.rank, case.received.num_rows, 2)
    for flat in flats:
        flat.dispatch()
        # The received rows stand for the experts' outputs, scaled so that every rank's differ.
        flat.rows_MH.mul_(1 + comm.rank / shape.ranks)
        if shape.layout == "rank":
            case.y_MH = flat.rows_MH
        if case.returned is None:
            case.combine(case.y_MH)
            check_rows(comm, shape, inputs, case, sampled_tokens(shape.tokens))
        flat.combine()
        check_flat(shape, flat, case)


def run_shape(comm: Any, group: Any, shape: Shape, label: str, repeats: int) -> Result:
    """Verify and time one shape on all ranks of ``comm``; ``group`` has the same ranks."""
    verify_small(comm, shape)
    inputs = make_inputs(shape, comm.rank)
    buffers = Buffers()
    flats = [
        FlatCase(exchange, shape, inputs, buffers)
        for exchange in (MpiExchange(comm), GlooExchange(group))
    ]
    case = EpcommCase(comm, shape, inputs)
    _verify(comm, shape, inputs, case, flats)
    assert case.received is not None
    assert case.returned is not None
    traffic = {"dispatch": case.received.traffic, "combine": case.returned.traffic}
    destinations = count_destinations(
        inputs.topk_idx_TK, shape.experts, shape.ranks, shape.ranks_per_node
    )
    cases: list[Case] = [case, *flats, CopyCase()]
    measure(comm, cases, 1)  # not counted: memory that is new to the process is slow
    timings = measure(comm, cases, repeats)
    case.close()
    return Result(
        shape=shape,
        label=label,
        timings=timings,
        rows_R=comm.allgather(len(flats[0].rows_MH)),
        ranks_per_token=float(np.mean(comm.allgather(destinations.ranks_per_token))),
        nodes_per_token=float(np.mean(comm.allgather(destinations.nodes_per_token))),
        traffic_R={step: comm.allgather(of_step) for step, of_step in traffic.items()},
    )
