"""The cases that time single calls: table, small sizes, SM sweep, skewed routing, host."""

from collections.abc import Callable
from functools import partial

from .exchange import FORMS, Exchange
from .figures import Table, least_bytes
from .timing import Effort, caller_time, host_time, time_calls

Call = Callable[[int], object]


def calls(exchange: Exchange, *, first: bool) -> list[tuple[str, int, Call]]:
    """Name, least bytes and call: cached dispatches, combine and, if asked, first dispatches."""
    sizes = {form: least_bytes(exchange, form) for form in FORMS}
    found: list[tuple[str, int, Call]] = [
        (f"dispatch {form}", sizes[form], partial(exchange.cached, form)) for form in FORMS
    ]
    found.append(("combine BF16", least_bytes(exchange, None), exchange.combine))
    if first:
        found += [(f"first {form}", sizes[form], partial(exchange.first, form)) for form in FORMS]
    return found


def table(exchange: Exchange, out: Table, effort: Effort) -> None:
    """Every call in a row of its like; then first and cached dispatches as a caller sees one."""
    every_call("table", exchange, out, effort)
    out.title("caller (one call on an idle GPU until its tensors can be used)", exchange)
    for form in FORMS:
        cached = caller_time(exchange.comm, partial(exchange.cached, form), effort)
        first = caller_time(exchange.comm, partial(exchange.first, form), effort)
        size, more = least_bytes(exchange, form), (first - cached) * 1e6
        out.add("caller", exchange, f"cached dispatch {form}", cached, size)
        out.add("caller", exchange, f"first dispatch {form}", first, size, us_more=more)


def every_call(case: str, exchange: Exchange, out: Table, effort: Effort) -> None:
    """Every call in a row of its like, with its host time."""
    out.title(case, exchange)
    for name, size, call in calls(exchange, first=True):
        seconds = time_calls(exchange.comm, call, effort)
        host = host_time(exchange.comm, call, effort)
        out.add(case, exchange, name, seconds, size, host)


def sweep_sms(exchange: Exchange, out: Table, effort: Effort) -> None:
    """Cached calls: what more SMs bring."""
    out.title("sms", exchange)
    for name, size, call in calls(exchange, first=False):
        out.add("sms", exchange, name, time_calls(exchange.comm, call, effort), size)


def host(exchange: Exchange, out: Table, effort: Effort) -> None:
    """Few small calls in a row: the host's time for each, not lengthened by the GPU's.

    Cached dispatches return before their peers have answered while every rank has windows left; a
    first one cannot, because its caller needs the row count.
    """
    out.title("host", exchange)
    for name, size, call in calls(exchange, first=True):
        seconds = caller_time(exchange.comm, call, effort)
        out.add("host", exchange, name, seconds, size, host_time(exchange.comm, call, effort))
