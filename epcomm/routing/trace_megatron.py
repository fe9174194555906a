"""Megatron-Core router traces: JSON lines, one record per (step, layer).

Written with ``--moe-routing-trace-path`` as ``router_trace_rank<r>.jsonl``. A record has ``step``,
``layer``, ``rank``, ``num_tokens``, ``topk`` and ``top_indices`` (``[num_tokens][topk]``); newer
versions add ``block`` (``"decoder"`` or ``"mtp"``), whose layer numbers overlap: only decoder
records are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .trace_common import RoutingTrace, check_ids, read_json, read_text, to_array

_INTEGER_FIELDS = ("step", "layer", "rank", "num_tokens", "topk")


def read_megatron(path: Path, layer: int | None, num_experts: int | None) -> RoutingTrace:
    """Read all decoder records of one layer, in file order; see ``load_trace``."""
    parts: list[npt.NDArray[np.int64]] = []
    num_topk = 0
    for line, text in enumerate(read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        where = f"{path}: line {line}"
        record = _check_record(read_json(path, text, line), where)
        if record.get("block", "decoder") != "decoder":
            continue
        if layer is None:
            layer = record["layer"]
        if record["layer"] != layer:
            continue
        ids_TK = _record_ids(record, num_experts, where)
        if parts and ids_TK.shape[1] != num_topk:
            raise ValueError(
                f"{where}: topk is {ids_TK.shape[1]}, earlier records of layer {layer} have "
                f"{num_topk}"
            )
        num_topk = ids_TK.shape[1]
        parts.append(ids_TK)
    if not parts or layer is None:
        wanted = "decoder records" if layer is None else f"decoder records of layer {layer}"
        raise ValueError(f"{path}: no {wanted}")
    topk_idx_TK = torch.from_numpy(np.concatenate(parts))
    return RoutingTrace(topk_idx_TK, None, num_experts, layer, str(path))


def _check_record(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
    for name in (*_INTEGER_FIELDS, "top_indices"):
        if name not in record:
            raise ValueError(f"{where}: field {name!r} is missing")
    for name in _INTEGER_FIELDS:
        if type(record[name]) is not int:
            raise ValueError(f"{where}: field {name!r} must be an integer, got {record[name]!r}")
    return record


def _record_ids(
    record: dict[str, Any], num_experts: int | None, where: str
) -> npt.NDArray[np.int64]:
    num_tokens, num_topk, rows = record["num_tokens"], record["topk"], record["top_indices"]
    if not isinstance(rows, list) or len(rows) != num_tokens:
        got = f"{len(rows)} rows" if isinstance(rows, list) else type(rows).__name__
        raise ValueError(f"{where}: num_tokens is {num_tokens}, but top_indices is {got}")
    for token, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != num_topk:
            got = f"{len(row)} entries" if isinstance(row, list) else type(row).__name__
            raise ValueError(f"{where}: topk is {num_topk}, but row {token} is {got}")
    if not rows:
        return np.zeros((0, num_topk), dtype=np.int64)
    array = to_array(rows, 2, "[num_tokens][topk]", f"{where}: top_indices")
    return check_ids(array, num_experts, where)
