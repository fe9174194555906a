"""What dispatches and combines of a buffer share: its state, verdicts, refusals and late errors."""

from ..backend import Config
from ..errors import BufferClosedError
from ..native import constants
from ..topology import Topology
from ..traffic import LinkTraffic, Traffic
from . import abi
from .credit import Credit
from .engine import Engine
from .forms import Agreed, Forms
from .phases import read_phases
from .routes import Routes
from .scaleout import ScaleOut
from .streams import Calls
from .verdicts import refusal, timeout
from .windows import WindowPool


class Core:
    """A buffer's state.

    Args:
        topology, config: of the buffer.
        engine: that launches its calls.
        forms: of its calls.
        timeout: seconds a peer may stay silent.

    Attributes:
        calls: on which streams they run.
        receive: windows that dispatches write into.
        expose: windows that combines read from.
        credit: dispatches that every rank is known to have a window for.
        closed: whether the buffer is.
    """

    def __init__(
        self, topology: Topology, config: Config, engine: Engine, forms: Forms, timeout: float
    ) -> None:
        self.topology, self.config = topology, config
        self.engine, self.forms = engine, forms
        self.scale_out: ScaleOut | None = engine.scale_out
        self.calls = Calls(engine)
        self.receive = WindowPool(engine)
        self.expose = WindowPool(engine)
        self.credit = Credit(engine.report)
        self.closed = False
        self._timeout = timeout

    def begin(self, async_op: bool = False) -> int:
        """Start a call; returns the stream to launch on."""
        if self.closed:
            raise BufferClosedError("the buffer is closed")
        if self.engine.report.failed:
            raise BufferClosedError(
                f"an earlier call failed, make a new Buffer: {timeout(self.engine)}"
            )
        if self.scale_out is not None:
            self.scale_out.fabric.check()
        return self.calls.begin(async_op)

    def raise_late_refusal(self) -> None:
        """Raise what a call that did not wait for its verdict met since.

        At the end of a call, never instead of one: the peers may not have seen it yet, and would
        wait for this rank.
        """
        report = self.engine.report
        refusals = report.refusals
        if refusals == report.acknowledged or self.calls.capturing:
            return
        verdict, bad = report.refused_verdict, report.refused_choice
        error = self._late_error(verdict, bad)
        report.acknowledged = refusals
        raise error

    def _late_error(self, verdict: int, bad: int) -> Exception:
        if bad >= 0:
            token, choice = divmod(bad, self.config.num_topk)
            return ValueError(
                f"topk_idx: at token {token}, choice {choice} of an earlier dispatch with "
                "fixed_rows, an expert id is out of range or twice in a row; nothing was sent"
            )
        if verdict == abi.constants["FIXED_ROWS"]:
            return ValueError(
                "fixed_rows: too few in an earlier dispatch, nothing was sent: some rank would "
                "have received more rows"
            )
        return refusal(self.engine, verdict)

    def end_refused(self) -> None:
        """Wait for a refused call to end; it is raised by whoever made it."""
        self.calls.synchronize()
        self.engine.report.acknowledged = self.engine.report.refusals

    def await_window(self) -> int:
        """Wait until every rank is known to have a window for the last dispatch, or its verdict.

        Reports of earlier calls may suffice, so that the host stays ahead of the GPU.

        Returns:
            The verdict, or OK.
        """
        last, judged = self.engine.number, 0
        while not self.credit.covers(last):
            judged = self.credit.next_report(judged, last)
            if judged == last:
                return self.await_verdict()
            self._await_report(judged)
        return abi.constants["OK"]

    def await_verdict(self) -> int:
        """Wait until the last call has been judged; returns the verdict.

        A combine is judged for the host only where it has no window that will do.
        """
        self._await_report(self.engine.number)
        return int(self.engine.report.verdict)

    def _await_report(self, number: int) -> None:
        """Wait until the call of this number, or a later one, has been judged."""
        if self.engine.wait_prepared(number, self._timeout + 30.0) != 0:
            if self.engine.error() is None:
                raise BufferClosedError(
                    f"a call did not start within {self._timeout + 30.0:.0f} s: the stream's "
                    "earlier work is not done"
                )
            raise timeout(self.engine)

    def refuse(self, op: str, error: Exception, stream: int) -> None:
        """Take part in a call as the rank that refuses it, so that no peer waits."""
        if self.calls.capturing:
            return  # no peer waits: a capture runs nothing
        self.engine.refuse(constants[op], str(error), stream)
        self.end_refused()

    def check(self) -> None:
        """Wait for all calls and raise what went wrong in one that did not wait."""
        self.calls.synchronize()
        if self.engine.error() is not None:
            raise timeout(self.engine)
        self.raise_late_refusal()
        if self.scale_out is not None:
            self.scale_out.fabric.check()

    def time(self, number: int, first: bool, *, combines: bool = False) -> dict[str, float]:
        """Seconds by phase of a call (waits)."""
        self.calls.synchronize()
        return read_phases(self.engine, number, first, combines=combines)

    def count(self, name: str, routes: Routes, row_bytes: int, agreed: Agreed) -> Traffic:
        """Bytes this rank moved in a call (waits)."""
        if self.scale_out is not None:
            assert routes.hops is not None
            return self.scale_out.count(name, routes.dest_ranks, routes.hops, row_bytes, agreed)
        ranks = routes.dest_ranks
        others = int(((ranks >= 0) & (ranks != self.topology.rank)).sum())
        meta = 8 + (4 if ranks.shape[1] == 0 else 12 * self.config.num_topk)
        return Traffic(scale_up=LinkTraffic(others, others * row_bytes, others * meta))
