"""The cases between nodes that time calls: through proxies, and over a modelled line."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from epcomm.formats.wire import WireFormat
from epcomm.native import RecordLayout, combine_record, dispatch_record

from ..floor import row_bytes
from ..measure import align
from ..triggers import CORES, NIC_GB_S, feed
from .crossing import Crossing
from .exchange import FORMS, Exchange, Form
from .figures import Table, least_bytes
from .goals import Goal, Goals
from .network import Counters, Line, name_of
from .timing import Effort, host_time, time_calls

#: Wanted of a modelled line: its share by number of nodes, within so many SMs of a rank.
_SHARES, _SHARE_OF_MORE_NODES = {2: 0.95}, 0.90
_MOST_SMS = 8
_OVER_IDEAL = 1.15
#: With a larger part of late messages the engine, not the model, says when they take effect.
_FEW_LATE = 0.01
#: The fewest SMs that reach a share.
_FEWEST_SHARE, _FEWEST_SMS = 0.90, 4


@dataclass(frozen=True)
class Timed:
    """A call to time.

    Attributes:
        name: for tables.
        call: with the turn, which chooses the input.
        record: what travels between nodes.
        row_bytes: of that, rows and scales.
        least: bytes that all ranks must read and write, without staging.
    """

    name: str
    call: Callable[[int], Any]
    record: RecordLayout
    row_bytes: int
    least: int


def timed_calls(exchange: Exchange, forms: tuple[Form, ...]) -> list[Timed]:
    """Cached dispatches, combine, and a first dispatch of an FP8 pair."""
    hidden, topk = exchange.shape.hidden, exchange.shape.topk

    def dispatch(name: str, form: Form, call: Callable[[int], Any]) -> Timed:
        wire = "bf16" if form == "BF16" else "fp8"
        record = dispatch_record(WireFormat[wire.upper()], hidden, topk)
        least = least_bytes(exchange, form)
        return Timed(f"{name} {form}", call, record, row_bytes(wire, hidden), least)

    calls = [dispatch("dispatch", form, partial(exchange.cached, form)) for form in forms]
    record = combine_record(WireFormat.BF16, hidden, topk, False)
    least = least_bytes(exchange, None)
    calls.append(Timed("combine BF16", exchange.combine, record, row_bytes("bf16", hidden), least))
    calls.append(dispatch("first dispatch", "FP8 pair", partial(exchange.first, "FP8 pair")))
    return calls


@dataclass(frozen=True)
class Between:
    """An exchange between nodes and what is known of it. Made collectively."""

    exchange: Exchange
    crossing: Crossing
    counters: Counters

    @classmethod
    def of(cls, exchange: Exchange) -> "Between":
        """Of an exchange that was made."""
        topk_idx = exchange.inputs.host.topk_idx_TK
        crossing = Crossing.of(exchange.comm, exchange.shape, topk_idx)
        return cls(exchange, crossing, Counters(exchange.buffer))

    @property
    def place(self) -> str:
        """What was measured with, for goals."""
        shape = self.exchange.shape
        return f"{name_of(self.exchange.fabric)}, {shape.nodes} x {shape.ranks_per_node}"

    def floor_bytes(self, timed: Timed) -> int:
        """Read and written by all ranks: inputs and results once, records into staging and out."""
        return timed.least + 2 * self.crossing.total * timed.row_bytes

    def copied_bytes(self, timed: Timed) -> int:
        """What ranks of one memory move: a record lies in two places, one copied to the other."""
        return self.floor_bytes(timed) + 2 * self.crossing.total * timed.row_bytes

    def of_least_out(self, timed: Timed, sent: float) -> float:
        """Bytes that all ranks sent to other nodes in a call, over the least.

        The least are rows and scales of one record for each token and other node.
        """
        return float(sent / (max(1, self.crossing.total) * timed.row_bytes))

    def describe(self, out: Table) -> None:
        """What crosses, and through what."""
        shape, crossing = self.exchange.shape, self.crossing
        tokens = shape.tokens * shape.ranks
        out.say(
            f"  {self.counters.description}\n"
            f"  {crossing.total / tokens:.2f} records a token; a rank sends or gets up to "
            f"{crossing.messages(self.counters.chunk_records)} chunks of "
            f"{self.counters.chunk_records} records"
        )


# Through proxies --------------------------------------------------------------------------


def proxy(exchange: Exchange, out: Table, effort: Effort, *, goals: Goals) -> None:
    """Time, bytes of each kind of link, triggers, the proxies' processor time."""
    between = Between.of(exchange)
    out.title("proxy", exchange)
    between.describe(out)
    for timed in timed_calls(exchange, FORMS):
        _through_proxies(between, timed, out, effort, goals)


def _through_proxies(
    between: Between, timed: Timed, out: Table, effort: Effort, goals: Goals
) -> None:
    exchange, counters, comm = between.exchange, between.counters, between.exchange.comm
    calls = 0

    def call(turn: int) -> Any:
        nonlocal calls
        calls += 1
        return timed.call(turn)

    before = counters.proxy()
    seconds = time_calls(comm, call, effort)
    exchange.synchronize()
    busy, triggers = ((counters.proxy() - before) / calls).tolist()
    host = host_time(comm, timed.call, effort)
    result = timed.call(0)
    traffic = result.traffic
    mine = (traffic.scale_up.total_bytes, traffic.scale_out.total_bytes, traffic.records)
    moved_RC = np.array(comm.allgather((*mine, triggers, busy)), np.float64)
    up, sent, records, triggers_R, busy_R = moved_RC.T
    records_out = max(1, between.crossing.total)
    floor = between.floor_bytes(timed)
    more = {
        "up MB": up.mean() / 1e6,
        "out MB": sent.mean() / 1e6,
        "busiest out MB": sent.max() / 1e6,
        "of least out": between.of_least_out(timed, sent.sum()),
        "triggers": triggers_R.max(),
        "proxy us": busy_R.mean() * 1e6,
        "moving us": _moving(comm, result) * 1e6,
        "copied %": 100 * out.machine.floor_seconds(between.copied_bytes(timed)) / seconds,
    }
    out.add("proxy", exchange, timed.name, seconds, floor, host, **more)
    what = f"{timed.name}: "
    add = partial(_add, goals, between)
    most = exchange.shape.nodes * counters.num_chunks
    add(what + "triggers a call", float(most), True, "", float(triggers_R.max()))
    once = float(records.sum()) / records_out
    add(what + "records for each token and other node", 1.0, True, "", once)
    if triggers_R.min() > 0:
        # Busy time has the looks at empty rings in it, so this is what is certain.
        each = float((busy_R / triggers_R).max())
        chunk = counters.chunk_records * timed.record.bytes
        note = f"{each * 1e6:.1f} us for each chunk of {chunk} bytes"
        seen = feed(chunk, each * 1e9)
        add(f"{what}{CORES} cores of proxies could feed", NIC_GB_S, False, "GB/s", seen, note)


def _moving(comm: Any, result: Any) -> float:
    """Seconds in which the slowest rank's kernel moved rows, by the GPU's clock; 0: unknown."""
    phases = result.phases
    return max(comm.allgather(phases.get("store", phases.get("reduce", 0.0))))


def _add(
    goals: Goals,
    between: Between,
    what: str,
    wanted: float,
    at_most: bool,
    unit: str,
    seen: float | None,
    note: str = "",
) -> None:
    sms = f"{between.exchange.sms} SMs"
    note = f"{sms}, {note}" if note else sms
    goals.add(Goal(between.place, what, wanted, at_most, unit, seen, note))


# Over a modelled line ---------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """The data of single calls, in the model's time.

    Attributes:
        seconds: from a rank's first departure until the last of what it sent was there in fact,
            of the rank whose rate is the lowest; median over calls, as all of these.
        rate: that rank's bytes on the wire in a second.
        together: likewise, from the first departure on any rank to the last arrival on any.
        late: part of the messages that took effect later than the model says.
        late_copies: part of them whose bytes were copied too late.
        lateness: seconds by which a message took effect later than the model says, mean.
        copier: whether the copier was the limit, on some rank in most calls.
        messages: of a rank, the most of a call.
        line: what the NICs model.
    """

    seconds: float
    rate: float
    together: float
    late: float
    late_copies: float
    lateness: float
    copier: bool
    messages: int
    line: Line

    @property
    def limit(self) -> str:
        """Whether times are the model's, or longer, and why."""
        if self.copier:
            return "copier: the network itself would take less time"
        if self.late > _FEW_LATE:
            late = f"{self.lateness * 1e6:.1f} us late in the mean"
            return f"engine: messages took effect {late}, as on a network with more latency"
        return "model"


def data_phase(
    exchange: Exchange, counters: Counters, call: Callable[[int], Any], turns: int
) -> Phase | None:
    """Count single calls on idle ranks; None where no network is modelled. Collective."""
    if counters.traffic(restart=True) is None:
        return None
    comm = exchange.comm
    seen = []
    for turn in range(turns + 1):
        exchange.synchronize()
        align(comm)
        counters.traffic(restart=True)
        align(comm)
        call(turn)
        exchange.synchronize()
        comm.Barrier()  # then everything that was sent has arrived
        counted = counters.traffic()
        assert counted is not None
        if turn:  # the first warms up
            seen.append(comm.allgather(counted))
    spans = np.array([_spans(counted_R) for counted_R in seen])
    everything = [one for counted_R in seen for one in counted_R]
    messages = [int(one["messages"]) for one in everything]

    def mean(name: str) -> float:
        return sum(int(one[name]) for one in everything) / max(1, sum(messages))

    seconds, rate, together = np.median(spans, axis=0)
    return Phase(
        seconds=float(seconds),
        rate=float(rate),
        together=float(together),
        late=mean("late_messages"),
        late_copies=mean("late_copies"),
        lateness=mean("total_late_ns") * 1e-9,
        copier=float(np.median([_copier_limits(counted_R) for counted_R in seen])) > 0.5,
        messages=max(messages),
        line=Line.of(everything[0]),
    )


def _spans(counted_R: list[np.ndarray]) -> tuple[float, float, float]:
    """Of one call: see ``seconds``, ``rate`` and ``together`` of :class:`Phase`."""
    first = np.array([int(one["data_depart_ns"]) for one in counted_R])
    # In fact: where the copier is behind the model, this is less than the line's rate.
    last = np.array([int(one["data_placed_ns"]) for one in counted_R])
    sent = np.array([int(one["wire_bytes"]) for one in counted_R])
    moved = last != 0  # there were data
    if not moved.any():
        return 0.0, 0.0, 0.0
    seconds = (last - first)[moved] * 1e-9
    rate = sent[moved] / seconds
    together = (last[moved].max() - first[moved].min()) * 1e-9
    return float(seconds[rate.argmin()]), float(rate.min()), float(together)


def _copier_limits(counted_R: list[np.ndarray]) -> bool:
    return any(bool(one["copier_was_the_limit"]) for one in counted_R)


@dataclass(frozen=True)
class LineFigure:
    """A call against the line's rate.

    Attributes:
        name: of the call.
        sms: of each rank.
        data_share: of the line's rate, during the data phase.
        over_ideal: time of the whole call over the ideal.
        copier: whether the copier was the limit: the network itself would take less time.
    """

    name: str
    sms: int
    data_share: float
    over_ideal: float
    copier: bool


def line(
    exchange: Exchange,
    out: Table,
    effort: Effort,
    *,
    case: str,
    forms: tuple[Form, ...],
    found: list[LineFigure],
) -> None:
    """Shares of the modelled line rate; appended to ``found`` on every rank."""
    between = Between.of(exchange)
    out.title(case, exchange)
    between.describe(out)
    for timed in timed_calls(exchange, forms):
        figure = _over_line(between, timed, out, effort, case)
        if figure is not None:
            found.append(figure)


def _over_line(
    between: Between, timed: Timed, out: Table, effort: Effort, case: str
) -> LineFigure | None:
    exchange, counters = between.exchange, between.counters
    seconds = time_calls(exchange.comm, timed.call, effort)
    phase = data_phase(exchange, counters, timed.call, effort.groups)
    chunk = counters.chunk_records * timed.record.bytes
    floor = between.floor_bytes(timed)
    result = timed.call(0)
    sent = exchange.comm.allreduce(result.traffic.scale_out.total_bytes)
    more = {
        "message KB": chunk / 1e3,
        "of least out": between.of_least_out(timed, sent),
        "moving us": _moving(exchange.comm, result) * 1e6,
        "copies us": out.machine.floor_seconds(between.copied_bytes(timed)) * 1e6,
    }
    if phase is None or phase.line.bytes_per_second == 0 or phase.seconds == 0:
        # No line to compare with; bytes as they are.
        plain = Line(1.0, 0.0, 1, 0)
        busiest = between.crossing.busiest_bytes(timed.record.bytes, counters.chunk_records, plain)
        more["call GB/s"] = busiest / seconds / 1e9
        out.add(case, exchange, timed.name, seconds, floor, **more)
        return None
    model = phase.line
    busiest = between.crossing.busiest_bytes(timed.record.bytes, counters.chunk_records, model)
    data_share = phase.rate / model.bytes_per_second
    over_ideal = seconds / model.ideal_seconds(busiest)
    more |= {
        "call GB/s": busiest / seconds / 1e9,
        "data GB/s": phase.rate / 1e9,
        "data us": phase.seconds * 1e6,
        "all data us": phase.together * 1e6,
        "data % of line": 100 * data_share,
        "call % of line": 100 * model.share(busiest, seconds),
        "call over ideal": over_ideal,
        "late copies %": 100 * phase.late_copies,
        "late %": 100 * phase.late,
        "mean late us": phase.lateness * 1e6,
        "messages": float(phase.messages),
    }
    out.add(case, exchange, timed.name, seconds, floor, **more)
    out.say(f"    modelled network, limit: {phase.limit}")
    return LineFigure(timed.name, exchange.sms, data_share, over_ideal, phase.copier)


def judge_line(goals: Goals, place: str, nodes: int, found: list[LineFigure]) -> None:
    """The wanted figures of a sweep over SMs."""
    share = _SHARES.get(nodes, _SHARE_OF_MORE_NODES)
    for name in ("dispatch FP8 pair", "combine BF16"):
        figures = [figure for figure in found if figure.name == name]
        what = f"{name}, line rate during the data phase, at most {_MOST_SMS} SMs a rank"
        few = [figure for figure in figures if figure.sms <= _MOST_SMS]
        best = max(few, key=lambda figure: figure.data_share, default=None)
        seen = None if best is None else 100 * best.data_share
        goals.add(Goal(place, what, 100 * share, False, "%", seen, _note(best)))
        what = f"{name}, SMs a rank for {_FEWEST_SHARE:.0%} of the line rate"
        reaching = [f for f in figures if f.data_share >= _FEWEST_SHARE]
        fewest = min((figure.sms for figure in reaching), default=None)
        never = fewest is None and bool(figures)
        goals.add(Goal(place, what, _FEWEST_SMS, True, "SMs", fewest, never=never))
    for name in ("first dispatch FP8 pair", "combine BF16"):
        figures = [figure for figure in found if figure.name == name]
        what = f"{name}, whole call over bytes / rate + 2 latencies"
        best = min(figures, key=lambda figure: figure.over_ideal, default=None)
        seen = None if best is None else best.over_ideal
        goals.add(Goal(place, what, _OVER_IDEAL, True, "", seen, _note(best)))


def _note(best: LineFigure | None) -> str:
    """A late copier only ever adds time, so what is reached in spite of it is."""
    if best is None:
        return ""
    return f"{best.sms} SMs" + (", the copier was late" if best.copier else "")
