"""Thousands of dispatches, cached dispatches and combines of changing sizes, each one checked."""

import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import harness
import numpy as np
import torch
from expectations import FACTORS, HIDDEN, MAX_TOKENS, Expected, Scenario, Table, differs

import epcomm
from epcomm import oracle
from epcomm.formats.wire import WireFormat

EXPERTS_PER_RANK, NUM_TOPK = 5, 4
CALLS_PER_ROUND = 3
#: A round whose results are compared with the oracle as well, and the tokens it may have.
_ORACLE_EVERY, _ORACLE_TOKENS = 67, 20
_SCENARIOS, _SMALL_SCENARIOS = 48, 12
RESULT_TENSORS = ("x", "scales", "topk_idx", "topk_weights", "source", "tokens_per_expert")
#: How (rows, quantize) reach dispatch, and the table that what arrives is compared with.
FORMATS = ("bf16", "f32", "fp8", "fp8_ue8m0", "pair f32", "pair ue8m0")


def on_host(result: Any) -> Any:
    """A result with its tensors on the host."""
    fields = {name: getattr(result, name, None) for name in RESULT_TENSORS}
    fields = {n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in fields.items()}
    return SimpleNamespace(num_rows=getattr(result, "num_rows", None), **fields)


def make_stressed_buffer(comm: Any, **options: Any) -> epcomm.Buffer:
    """A buffer for `Stress`."""
    num_experts = EXPERTS_PER_RANK * comm.size
    return epcomm.Buffer(
        comm,
        hidden=HIDDEN,
        num_experts=num_experts,
        num_topk=min(NUM_TOPK, num_experts),
        max_tokens=MAX_TOKENS,
        ranks_per_node=comm.size,
        **{"timeout": 30.0, **options},
    )


@dataclass
class Held:
    """A result kept alive over later rounds, and what it must still hold."""

    round: int
    x: torch.Tensor
    want: torch.Tensor


class Stress:
    """One rank's part. All ranks make the same choices, drawn from the round's number.

    Args:
        streams: CUDA streams that the rounds use in turn; none on the CPU.
    """

    def __init__(self, comm: Any, buffer: epcomm.Buffer, device: torch.device, streams: int = 0):
        self.comm, self.buffer, self.device = comm, buffer, device
        self.table = Table(device)
        num_experts = EXPERTS_PER_RANK * comm.size
        self.scenarios = [
            Scenario(
                seed,
                comm.rank,
                comm.size,
                num_experts,
                min(NUM_TOPK, num_experts),
                _ORACLE_TOKENS if seed < _SMALL_SCENARIOS else MAX_TOKENS,
            )
            for seed in range(_SCENARIOS)
        ]
        self.expected = [
            {layout: one.expect(layout, device) for layout in ("rank", "expert")}
            for one in self.scenarios
        ]
        self.inputs = [
            (torch.from_numpy(one.topk[comm.rank]), torch.from_numpy(one.weights[comm.rank]))
            for one in self.scenarios
        ]
        self.inputs = [(ids.to(device), weights.to(device)) for ids, weights in self.inputs]
        self.bases = [one.base.to(device) for one in self.scenarios]
        self.held: deque[Held] = deque()
        self.suspects: list[tuple[str, torch.Tensor | bool]] = []
        self.streams = [torch.cuda.Stream() for _ in range(streams)]

    def run(self, calls: int) -> None:
        """At least this many calls."""
        previous = None
        for number in range(-(-calls // CALLS_PER_ROUND)):
            stream = self.streams[number % len(self.streams)] if self.streams else None
            if stream is not None:
                stream.wait_stream(previous or torch.cuda.current_stream())
            previous = stream
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                self.round(number)
                if number % 50 == 0:
                    self.judge()
        self.judge()

    def round(self, number: int) -> None:
        """A dispatch, a combine and a cached dispatch, as the number says."""
        rng = np.random.default_rng([5, number])
        with_oracle = number % _ORACLE_EVERY == _ORACLE_EVERY - 1
        which = int(rng.integers(_SMALL_SCENARIOS if with_oracle else _SCENARIOS))
        layout = ("rank", "expert")[rng.integers(2)]
        with_weights = bool(rng.integers(4))
        first, second = (FORMATS[i] for i in rng.integers(len(FORMATS), size=2))
        fixed = bool(rng.random() < 0.15)
        in_place = bool(rng.integers(2))
        async_op = bool(rng.random() < 0.25)
        # Ranks come at different times, as they do after work of different length.
        if np.random.default_rng([6, number, self.comm.rank]).random() < 0.02:
            time.sleep(0.001)
        want = self.expected[which][layout]
        ids, weights = self.inputs[which]
        given = weights if with_weights else None
        recv = self.buffer.dispatch(
            self._rows(which, number, first)[0],
            ids,
            given,
            quantize=self._rows(which, number, first)[1],
            layout=layout,
            alignment=self.scenarios[which].alignment if layout == "expert" else 1,
            fixed_rows=want.max_rows + 3 if fixed else None,
            async_op=async_op,
        )
        recv.event.wait()
        label = f"round {number}: {first}, {layout}, scenario {which}, fixed {fixed}"
        base = self._check_dispatch(label, recv, want, first, with_weights, number)
        if with_oracle:
            self._compare_with_oracle(which, layout, recv, first, number, with_weights, fixed)
        out = self._combine(label, recv, want, base, number, in_place, which)
        self._suspect(f"{label}: combine", out)
        rows, quantize = self._rows(which, -number, second)
        again = self.buffer.dispatch(
            rows, topk_weights=given, quantize=quantize, handle=recv.handle, async_op=async_op
        )
        again.event.wait()
        self._check_dispatch(f"{label}, then {second}", again, want, second, with_weights, -number)
        self._hold(Held(number, again.x, self._payload(second, base, -number)))

    def _rows(self, which: int, call: int, fmt: str) -> tuple[Any, Any]:
        """(x, quantize) of this rank's tokens in a call."""
        at = self.table.places(self.bases[which], call)
        if fmt.startswith("pair"):
            q, scales = self.table.packed[fmt.removeprefix("pair ")]
            # torch gathers no FP8.
            return (q.view(torch.uint8)[at].view(torch.float8_e4m3fn), scales[at]), None
        if fmt == "f32":
            return self.table.f32[at], None
        return self.table.bf16[at], None if fmt == "bf16" else fmt

    def _payload(self, fmt: str, base: torch.Tensor, call: int) -> torch.Tensor:
        at = self.table.places(base, call)
        if fmt == "bf16":
            return self.table.bf16[at]
        if fmt == "f32":
            return self.table.f32[at]
        q = self.table.packed["ue8m0" if fmt.endswith("ue8m0") else "f32"][0]
        return q.view(torch.uint8)[at].view(torch.float8_e4m3fn)

    def _check_dispatch(
        self,
        label: str,
        recv: epcomm.DispatchResult,
        want: Expected,
        fmt: str,
        with_weights: bool,
        call: int,
    ) -> torch.Tensor:
        """Compare everything; returns the base places of the rows, also of those in excess."""
        excess = recv.handle.num_rows - len(want.base)
        assert excess >= 0, label
        assert recv.num_rows == len(want.base), label
        assert recv.tokens_per_expert.tolist() == want.tokens_per_expert, label

        def padded(rows: torch.Tensor, value: float) -> torch.Tensor:
            if not excess:
                return rows
            return torch.cat([rows, rows.new_full((excess, *rows.shape[1:]), value)])

        base = padded(want.base, -1)
        self._suspect(f"{label}: rows", differs(recv.x, self._payload(fmt, base, call)))
        scales = None
        if fmt not in ("bf16", "f32"):
            table = self.table.packed["ue8m0" if fmt.endswith("ue8m0") else "f32"][1]
            scales = table[self.table.places(base, call)]
        self._suspect(f"{label}: scales", differs(recv.scales, scales))
        self._suspect(f"{label}: source", differs(recv.source, padded(want.source, -1)))
        ids = None if want.topk_idx is None else padded(want.topk_idx, -1)
        self._suspect(f"{label}: topk_idx", differs(recv.topk_idx, ids))
        weights = padded(want.topk_weights, 0.0) if with_weights else None
        self._suspect(f"{label}: topk_weights", differs(recv.topk_weights, weights))
        return base

    def _combine(
        self,
        label: str,
        recv: epcomm.DispatchResult,
        want: Expected,
        base: torch.Tensor,
        call: int,
        in_place: bool,
        which: int,
    ) -> torch.Tensor | bool:
        """Whether the sums differ from the tokens times the factors of the ranks they went to."""
        factor = FACTORS[self.comm.rank % len(FACTORS)]
        rows = self._payload("bf16", base, call) * factor
        if in_place:
            y = self.buffer.combine_input(recv.handle).copy_(rows)
        elif call % 3 == 0 and recv.x.dtype == torch.bfloat16:
            y = recv.x.mul_(factor)  # where it was received
        else:
            y = rows
        out = self.buffer.combine(y, recv.handle)
        own = self.table.f32[self.table.places(self.bases[which], call)]
        return differs(out.x, (own * want.sums + 0.0).to(torch.bfloat16))

    def _compare_with_oracle(
        self,
        which: int,
        layout: str,
        recv: epcomm.DispatchResult,
        fmt: str,
        call: int,
        with_weights: bool,
        fixed: bool,
    ) -> None:
        """A dispatch and a combine with all options equal the oracle."""
        scenario, size = self.scenarios[which], self.comm.size
        inputs = []
        for rank in range(size):
            at = self.table.places(rank * MAX_TOKENS + torch.arange(len(scenario.topk[rank])), call)
            rows = self.table.f32.cpu()[at]
            x: Any = rows if fmt == "f32" else rows.to(torch.bfloat16)
            if fmt.startswith("pair"):
                q, scales = self.table.packed[fmt.removeprefix("pair ")]
                codes = q.view(torch.uint8).cpu()[at].view(torch.float8_e4m3fn)
                x = (codes, scales.cpu()[at])
            weights = torch.from_numpy(scenario.weights[rank])
            ids = torch.from_numpy(scenario.topk[rank])
            inputs.append(oracle.Input(x, ids, weights if with_weights else None))
        world = oracle.World(
            [0] * size,
            EXPERTS_PER_RANK * size,
            layout,
            scenario.alignment if layout == "expert" else 1,
            fmt if fmt.startswith("fp8") else None,
            recv.handle.num_rows if fixed else None,
        )
        received = oracle.dispatch(inputs, world)
        harness.assert_received(on_host(recv), received[self.comm.rank])
        case = harness.Case(size, HIDDEN, EXPERTS_PER_RANK, inputs[0].topk_idx.shape[1])
        case = replace(case, layout=layout, row_weights=True, num_bias=2)
        outputs = harness.draw_outputs(case, received, inputs)
        sums = oracle.combine(outputs, received, inputs, world, WireFormat.BF16)
        mine = outputs[self.comm.rank]
        back = self.buffer.combine(
            mine.y.to(self.device),
            recv.handle,
            weights=mine.weights.to(self.device),
            topk_weights=mine.topk_weights.to(self.device),
            bias=tuple(bias.to(self.device) for bias in mine.bias),
        )
        harness.assert_combined(on_host(back), sums[self.comm.rank])

    def _hold(self, result: Held) -> None:
        """Later calls must not touch what is still alive."""
        self.held.append(result)
        if len(self.held) > 2:
            oldest = self.held.popleft()
            self._suspect(f"round {oldest.round}: kept rows", differs(oldest.x, oldest.want))

    def _suspect(self, label: str, differs: torch.Tensor | bool) -> None:
        if differs is True:
            raise AssertionError(f"{label}: another shape or dtype")
        if differs is not False:
            self.suspects.append((label, differs))

    def judge(self) -> None:
        """Look at what the device found; once in many rounds, as it waits for the device."""
        if self.suspects:
            found = torch.stack([flag for _, flag in self.suspects]).tolist()
            wrong = [label for (label, _), bad in zip(self.suspects, found, strict=True) if bad]
            assert not wrong, f"rank {self.comm.rank}: {wrong[:5]} and {len(wrong)} in all"
        self.suspects.clear()
