"""What the trace readers share: the result, and checks that name the place of a fault."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True)
class RoutingTrace:
    """The recorded routing of one MoE layer.

    Attributes:
        topk_idx_TK: int64 ``[T, K]`` on the CPU, expert ids as recorded; -1 marks a slot the
            recorder left empty.
        topk_weights_TK: float32 ``[T, K]``, or None where the format records none.
        num_experts: E where it is recorded or was given, else None.
        layer: the layer, in the numbering of the file.
        source: the file, for messages.
    """

    topk_idx_TK: torch.Tensor
    topk_weights_TK: torch.Tensor | None
    num_experts: int | None
    layer: int
    source: str


def read_json(path: Path, text: str, line: int = 1) -> Any:
    """Parse JSON text that starts at ``line`` of the file; ValueError names file and line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = line + error.lineno - 1
        raise ValueError(
            f"{path}: line {where}: not valid JSON, or cut short: {error.msg} "
            f"(column {error.colno})"
        ) from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise ValueError(f"{path}: line {line}: not readable JSON: {error}") from None


def read_text(path: Path) -> str:
    """Read a UTF-8 file; ValueError names the file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from None


def to_array(value: Any, ndim: int, shape_words: str, where: str) -> npt.NDArray[Any]:
    """Turn nested lists, a tensor or an array into an integer array of ``ndim`` dimensions."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{where}: ragged rows, expected {shape_words}") from None
    # An empty list has no dtype and fewer dimensions than what it is an empty case of.
    if array.size == 0 and array.dtype.kind == "f" and isinstance(value, list):
        array = np.zeros(array.shape + (0,) * (ndim - array.ndim), dtype=np.int64)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{where}: expected integers, got dtype {array.dtype}")
    if array.ndim != ndim:
        raise ValueError(f"{where}: expected {shape_words}, got shape {list(array.shape)}")
    return array


def check_ids(
    ids_TK: npt.NDArray[Any], num_experts: int | None, where: str
) -> npt.NDArray[np.int64]:
    """Check expert ids and return them as int64.

    Raises:
        ValueError: an id is below -1, or not below ``num_experts``; or a token names an expert
            twice.
    """
    high = num_experts if num_experts is not None else np.iinfo(np.int64).max
    wrong = np.argwhere((ids_TK < -1) | (ids_TK >= high))
    if len(wrong):
        token, slot = wrong[0]
        limit = "-1 or more" if num_experts is None else f"in -1..{num_experts - 1}"
        raise ValueError(
            f"{where}: token {token}: expert id {ids_TK[token, slot]} is out of range, "
            f"ids must be {limit}"
        )
    ids_TK = ids_TK.astype(np.int64)
    sorted_TK = np.sort(ids_TK, axis=1)
    twice = np.argwhere((sorted_TK[:, 1:] == sorted_TK[:, :-1]) & (sorted_TK[:, 1:] >= 0))
    if len(twice):
        token, slot = twice[0]
        raise ValueError(f"{where}: token {token}: expert {sorted_TK[token, slot]} appears twice")
    return ids_TK


def check_layer(layer: int, num_layers: int, path: Path) -> None:
    """Raise ValueError unless the layer exists."""
    if not 0 <= layer < num_layers:
        raise ValueError(f"{path}: layer must be in 0..{num_layers - 1}, got {layer}")
