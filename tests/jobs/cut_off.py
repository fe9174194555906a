"""A rank of two hosts that are cut off from each other: ``cut_off.py FOLDER WHEN HOW TIMEOUT``.

The last rank takes its host off the link: HOW is "down" (the interface goes down) or "one way"
(its frames go nowhere, those of the other host still arrive). WHEN: "calls" (in the middle of
dispatches and combines), "gloo calls", "making" (of a Buffer; an earlier one worked) or "first".
Every rank writes what ended it to FOLDER/RANK.json, waits for the others and ends by its error.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI

import epcomm

COMM = MPI.COMM_WORLD
TOKENS, HIDDEN, EXPERTS, TOPK = 256, 512, 24, 4
CUT = {
    "down": "ip link set e0 down",
    # An address that nobody has.
    "one way": "ip neighbour replace 10.77.1.1 lladdr 02:00:00:00:00:99 dev e0 nud permanent",
}


def cut(folder: Path, how: str) -> None:
    subprocess.run(CUT[how].split(), check=True)
    (folder / "cut").write_text(str(time.monotonic()))


def make_buffer(group: Any, timeout: float) -> epcomm.Buffer:
    return epcomm.Buffer(
        group,
        hidden=HIDDEN,
        num_experts=EXPERTS,
        num_topk=TOPK,
        max_tokens=TOKENS,
        timeout=timeout,
    )


def call_for_ever(buffer: epcomm.Buffer) -> None:
    x = torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16)
    while True:
        recv = buffer.dispatch(x, torch.rand(TOKENS, EXPERTS).topk(TOPK)[1])
        buffer.combine(recv.x, recv.handle)


def prepare(folder: Path, when: str, how: str, timeout: float) -> Callable[[], object]:
    """Do what precedes the cut and return what it is to end."""
    group: Any = COMM
    if when == "gloo calls":
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=COMM.rank, world_size=COMM.size)
        group = dist.group.WORLD
    last = COMM.rank == COMM.size - 1
    if when.endswith("calls"):
        buffer = make_buffer(group, timeout)
        COMM.Barrier()
        if last:
            threading.Timer(1.0, cut, (folder, how)).start()
        return lambda: call_for_ever(buffer)
    if when == "making":
        make_buffer(group, timeout).close()
    COMM.Barrier()
    if last:
        time.sleep(0.5)  # for the others to leave the barrier
        cut(folder, how)
    else:
        while not (folder / "cut").exists():
            time.sleep(0.01)
    return lambda: make_buffer(group, timeout)


def main(folder: Path, when: str, how: str, timeout: float) -> None:
    ended_by_cut = prepare(folder, when, how, timeout)
    try:
        ended_by_cut()
        error: Exception = AssertionError("the cut was not noticed")
    except Exception as caught:
        error = caught
    outcome = {
        "after": time.monotonic() - float((folder / "cut").read_text()),
        "kind": type(error).__name__,
        "message": str(error),
        "ranks": getattr(error, "ranks", None),
    }
    (folder / f"{COMM.rank}.json").write_text(json.dumps(outcome))
    # The first error ends the whole job, so that the others' would not be seen.
    until = time.monotonic() + 20.0
    while time.monotonic() < until and len(list(folder.glob("*.json"))) < COMM.size:
        time.sleep(0.05)
    raise error


main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4]))
