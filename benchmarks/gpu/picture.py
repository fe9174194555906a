"""A timeline of one dispatch and one combine on all ranks, for a viewer of Chrome traces."""

from epcomm.timeline import Trace, merge

from .exchange import Exchange
from .figures import Table
from .timing import Effort

#: Calls before, so that nothing in the picture happens for the first time.
_WARM_UP = 3


def picture(exchange: Exchange, out: Table, effort: Effort, *, path: str) -> None:
    """Write the merged trace of a first dispatch of an FP8 pair and a combine. Collective.

    Args:
        exchange: whose buffer has a timeline.
        out: is told where the trace is.
        effort: of measurements; a picture needs none.
        path: of the file.
    """
    del effort
    for turn in range(_WARM_UP):
        exchange.first("FP8 pair", turn)
        exchange.combine(turn)
    exchange.buffer.timeline(restart=True)
    exchange.comm.Barrier()  # else the picture begins with waiting for the last to get here
    exchange.first("FP8 pair", _WARM_UP)
    exchange.combine(_WARM_UP)
    traces = exchange.comm.gather(exchange.buffer.timeline().data)
    if traces is None:
        return
    trace = merge([Trace(data) for data in traces])
    trace.save(path)
    out.say(f"{path}: {len(trace.events)} events of {len(trace.ranks)} ranks, {trace.lost} lost")
    for words in sorted({words for rank in trace.ranks for words in rank["not_shown"]}):
        out.say(f"  not shown: {words}")
