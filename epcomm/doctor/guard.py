"""A probe in a process of its own, which may hang or crash without taking the report along."""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from .report import BROKEN, Finding

#: Forked: nothing is imported again. The parent has no CUDA context that a child could not use.
context = multiprocessing.get_context("fork")
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have this process killed when the one that forked it ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _run(probe: Callable[..., Any], arguments: tuple[Any, ...], out: Connection) -> None:
    end_with_parent()
    try:
        out.send((None, probe(*arguments)))
    except BaseException as error:
        out.send((f"{type(error).__name__}: {error}", None))
    out.close()
    os._exit(0)


class ProbeError(Exception):
    """A probe that raised, crashed, or did not end in time."""


def within(seconds: float, probe: Callable[..., Any], *arguments: Any) -> Any:
    """What ``probe(*arguments)`` returns, run in a forked process.

    Raises:
        ProbeError: it raised, its process died, or it did not end in ``seconds``.
    """
    into, out = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(probe, arguments, out))
    process.start()
    out.close()
    try:
        if not into.poll(seconds):
            raise ProbeError(f"did not end in {seconds:g} s")
        error, value = into.recv()
    except EOFError:
        process.join(1.0)
        raise ProbeError(f"its process died (exit code {process.exitcode})") from None
    finally:
        # A process that the kernel does not let go cannot be waited for.
        process.kill()
        process.join(1.0)
        into.close()
    if error is not None:
        raise ProbeError(error)
    return value


def findings_within(
    seconds: float, topic: str, remedy: str, probe: Callable[..., list[Finding]], *arguments: Any
) -> list[Finding]:
    """A probe's findings; one that says why there are none where it failed."""
    try:
        return within(seconds, probe, *arguments)
    except ProbeError as error:
        return [Finding(topic, "probe", BROKEN, str(error), remedy)]
