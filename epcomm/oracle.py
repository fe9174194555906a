"""The meaning of dispatch and combine: plain NumPy over all ranks' inputs, slow and obvious.

Every back end must produce these bytes. Rows are lists of bytes, so nothing is lost in a
conversion; sums are float32, one operation after the other, in the order the loops say.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from .formats import reference
from .formats.wire import WireFormat


@dataclass
class Input:
    """What one rank passes to dispatch; None weights mean none on any rank.

    Attributes:
        x: bfloat16 or float32 [T, H], or a packed pair.
        topk_idx: int64 [T, K].
        topk_weights: float32 [T, K] or None.
    """

    x: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor | None = None


@dataclass
class Route:
    """One row of a rank's output: whose token it is and which choices it serves."""

    source: int
    token: int
    choices: list[int]


@dataclass
class Received:
    """What one rank gets.

    Attributes:
        routes: for every row its Route, None for padding.
        payload, scales: uint8 [M, bytes].
        topk_idx: int64 [M, K]; None in layout expert.
        topk_weights: float32 [M, K] ([M] in layout expert) or None.
        source: int32 [M, 2].
        tokens_per_expert: int32 [E/R].
        num_rows: rows in use.
    """

    routes: list[Route | None]
    payload: np.ndarray
    scales: np.ndarray
    topk_idx: np.ndarray | None
    topk_weights: np.ndarray | None
    source: np.ndarray
    tokens_per_expert: np.ndarray
    num_rows: int


@dataclass
class World:
    """The group: which rank is on which node, which experts exist, how rows are laid out."""

    node_of: Sequence[int]
    num_experts: int
    layout: str = "rank"
    alignment: int = 1
    quantize: str | None = None
    fixed_rows: int | None = None

    @property
    def num_ranks(self) -> int:
        return len(self.node_of)

    @property
    def experts_per_rank(self) -> int:
        return self.num_experts // self.num_ranks


@dataclass
class Outputs:
    """What one rank passes to combine, and what it adds."""

    y: torch.Tensor
    weights: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None
    bias: Sequence[torch.Tensor] = field(default_factory=list)


def to_bytes(x: torch.Tensor) -> np.ndarray:
    """The bytes of a 2-D tensor, uint8 [rows, bytes]."""
    if x.numel() == 0:  # torch does not reinterpret every empty tensor
        return np.zeros((x.shape[0], x.shape[1] * x.element_size()), np.uint8)
    return x.contiguous().view(torch.uint8).numpy()


def to_f32(x: torch.Tensor) -> np.ndarray:
    """Exact float32 values of a bfloat16 or float32 tensor."""
    return x.float().numpy()


def pack(
    x: torch.Tensor | tuple[torch.Tensor, torch.Tensor], quantize: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Payload and scale bytes of every token, uint8 [T, ...]."""
    if isinstance(x, tuple):
        return to_bytes(x[0]), to_bytes(x[1])
    if quantize is None:
        return to_bytes(x), np.zeros((x.shape[0], 0), np.uint8)
    codes, scales = reference.fp8_encode(to_f32(x), "ue8m0" if quantize == "fp8_ue8m0" else "f32")
    return codes, np.ascontiguousarray(scales).view(np.uint8)


def _routes_by_rank(inputs: Sequence[Input], world: World, rank: int) -> list[Route | None]:
    routes: list[Route | None] = []
    for source, given in enumerate(inputs):
        for token, experts in enumerate(given.topk_idx.tolist()):
            mine = [
                k for k, e in enumerate(experts) if e >= 0 and e // world.experts_per_rank == rank
            ]
            if mine:
                routes.append(Route(source, token, mine))
    return routes


def _routes_by_expert(inputs: Sequence[Input], world: World, rank: int) -> list[Route | None]:
    routes: list[Route | None] = []
    for expert in range(rank * world.experts_per_rank, (rank + 1) * world.experts_per_rank):
        for source, given in enumerate(inputs):
            for token, experts in enumerate(given.topk_idx.tolist()):
                if expert in experts:
                    routes.append(Route(source, token, [experts.index(expert)]))
        while len(routes) % world.alignment:
            routes.append(None)
    return routes


def dispatch(inputs: Sequence[Input], world: World) -> list[Received]:
    """What every rank receives."""
    packed = [pack(given.x, world.quantize) for given in inputs]
    return [_receive(inputs, packed, world, rank) for rank in range(world.num_ranks)]


def _receive(
    inputs: Sequence[Input],
    packed: Sequence[tuple[np.ndarray, np.ndarray]],
    world: World,
    rank: int,
) -> Received:
    by_expert = world.layout == "expert"
    find = _routes_by_expert if by_expert else _routes_by_rank
    routes = find(inputs, world, rank)
    num_rows = len(routes)
    if world.fixed_rows is not None:
        routes += [None] * (world.fixed_rows - num_rows)
    rows, num_topk = len(routes), inputs[0].topk_idx.shape[1]
    payload = np.zeros((rows, packed[0][0].shape[1]), np.uint8)
    scales = np.zeros((rows, packed[0][1].shape[1]), np.uint8)
    topk_idx = np.full((rows, num_topk), -1, np.int64)
    topk_weights = np.zeros((rows, num_topk), np.float32)
    row_weights = np.zeros(rows, np.float32)
    source = np.full((rows, 2), -1, np.int32)
    for row, route in enumerate(routes):
        if route is None:
            continue
        given = inputs[route.source]
        payload[row] = packed[route.source][0][route.token]
        scales[row] = packed[route.source][1][route.token]
        source[row] = route.source, route.token
        for k in route.choices:
            topk_idx[row, k] = int(given.topk_idx[route.token, k]) % world.experts_per_rank
            if given.topk_weights is not None:
                topk_weights[row, k] = row_weights[row] = given.topk_weights[route.token, k].item()
    tokens_per_expert = np.zeros(world.experts_per_rank, np.int32)
    for given in inputs:
        for expert in given.topk_idx.flatten().tolist():
            if expert >= 0 and expert // world.experts_per_rank == rank:
                tokens_per_expert[expert % world.experts_per_rank] += 1
    weighted = inputs[0].topk_weights is not None
    return Received(
        routes=routes,
        payload=payload,
        scales=scales,
        topk_idx=None if by_expert else topk_idx,
        topk_weights=(row_weights if by_expert else topk_weights) if weighted else None,
        source=source,
        tokens_per_expert=tokens_per_expert,
        num_rows=num_rows,
    )


def through_wire(x_f32: np.ndarray, wire: WireFormat) -> np.ndarray:
    """What is left of float32 values [H] after they crossed between nodes."""
    if wire is WireFormat.F32:
        return x_f32
    if wire is WireFormat.BF16:
        return reference.bf16_to_f32(reference.f32_to_bf16(x_f32))
    row = reference.logfmt_encode(x_f32[None], wire.logfmt_bits)
    return reference.logfmt_decode(row, x_f32.size, wire.logfmt_bits)[0]


def combine(
    outputs: Sequence[Outputs],
    received: Sequence[Received],
    inputs: Sequence[Input],
    world: World,
    wire: WireFormat,
) -> list[tuple[torch.Tensor, np.ndarray | None]]:
    """What every rank gets back: sums [T, H] in the rows' dtype, and top-k weights [T, K]."""
    dtype = outputs[0].y.dtype
    hidden = outputs[0].y.shape[1]
    rows_f32 = [to_f32(given.y) for given in outputs]
    # (source, token) -> [(rank, choice, row)], ranks ascending, choices ascending in a rank.
    found: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for rank, got in enumerate(received):
        for row, route in enumerate(got.routes):
            if route is not None:
                key = (route.source, route.token)
                found.setdefault(key, []).append((rank, route.choices[0], row))
    results = []
    for home, given in enumerate(inputs):
        num_tokens, num_topk = given.topk_idx.shape
        sums = np.zeros((num_tokens, hidden), np.float32)
        home_weights = np.zeros((num_tokens, num_topk), np.float32)
        for token in range(num_tokens):
            places = sorted(found.get((home, token), []))
            for node in range(max(world.node_of) + 1):
                here = [p for p in places if world.node_of[p[0]] == node]
                if not here:
                    continue
                part = np.zeros(hidden, np.float32)
                for rank, _, row in here:
                    weights = outputs[rank].weights
                    values = rows_f32[rank][row]
                    part += values if weights is None else np.float32(weights[row]) * values
                if node != world.node_of[home]:
                    part = through_wire(part, wire)
                sums[token] += part
            for bias in outputs[home].bias:
                sums[token] += to_f32(bias)[token]
            _bring_weights_home(home_weights[token], places, outputs, received, world)
        result = torch.from_numpy(sums)
        if dtype == torch.bfloat16:
            result = torch.from_numpy(reference.f32_to_bf16(sums).view(np.int16)).view(dtype)
        weighted = outputs[home].topk_weights is not None
        results.append((result, home_weights if weighted else None))
    return results


def _bring_weights_home(
    home_K: np.ndarray,
    places: Sequence[tuple[int, int, int]],
    outputs: Sequence[Outputs],
    received: Sequence[Received],
    world: World,
) -> None:
    for rank, _, row in places:
        given, route = outputs[rank].topk_weights, received[rank].routes[row]
        if given is None or route is None:
            continue
        for k in route.choices:
            home_K[k] = given[row].item() if world.layout == "expert" else given[row, k].item()
