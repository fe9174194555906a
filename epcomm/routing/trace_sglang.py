"""SGLang expert-distribution recordings: routings per token, or counts per expert.

Mode ``per_token`` dumps with ``torch.save`` a dict whose ``records`` each hold
``topk_ids_of_layer`` ``[model layers, tokens, 8]``, one record per forward pass, with -1 where
nothing was recorded (dense layers, models with fewer than 8 experts per token). The ids are those
of *physical* experts, replicas included, which is what travels. Modes ``stat`` and
``stat_approx`` dump ``logical_count``, ``[layers, experts]`` or ``[steps, layers, experts]``.
Either may also come as JSON with the same keys, and a single ``topk_ids_of_layer`` bare or as .npy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .trace_common import RoutingTrace, check_ids, check_layer, read_json, read_text, to_array
from .trace_vllm import read_npy

_IDS = "topk_ids_of_layer"
_COUNTS = "logical_count"
_MAP = "last_physical_to_logical_map"


def read_sglang(path: Path, layer: int | None, num_experts: int | None) -> RoutingTrace:
    """Read one layer of all records, in file order; see ``load_trace``."""
    content = _read(path)
    if isinstance(content, dict) and num_experts is None and _MAP in content:
        physical = to_array(content[_MAP], 2, "[layers, physical experts]", f"{path}: {_MAP}")
        num_experts = physical.shape[1]
    arrays = _id_arrays(content, path)
    for place, ids_LTK in arrays:
        if ids_LTK.shape[::2] != arrays[0][1].shape[::2]:
            raise ValueError(
                f"{place}: shape {list(ids_LTK.shape)} does not fit the first one's, "
                f"{list(arrays[0][1].shape)}"
            )
    num_layers = arrays[0][1].shape[0]
    if layer is None:
        used = (i for i in range(num_layers) if any((ids[i] >= 0).any() for _, ids in arrays))
        layer = next(used, 0)
    check_layer(layer, num_layers, path)
    ids_TK = np.concatenate(
        [check_ids(ids[layer], num_experts, f"{place}: layer {layer}") for place, ids in arrays]
    )
    used_K = (ids_TK >= 0).any(axis=0)
    if not used_K.any():
        raise ValueError(f"{path}: layer {layer} has no recorded tokens (a dense layer?)")
    ids_TK = ids_TK[:, : int(np.flatnonzero(used_K)[-1]) + 1]
    return RoutingTrace(torch.from_numpy(ids_TK.copy()), None, num_experts, layer, str(path))


def load_expert_counts(path: str | Path) -> npt.NDArray[np.int64]:
    """Read ``logical_count`` of an SGLang recording (.json or .pt).

    Returns:
        int64 ``[layers, experts]``, summed over the recorded steps.

    Raises:
        ValueError: the file is damaged or holds no counts; the message names the place.
    """
    path = Path(path)
    content = _read(path)
    if not isinstance(content, dict) or _COUNTS not in content:
        raise ValueError(f"{path}: field {_COUNTS!r} is missing")
    where, words = f"{path}: {_COUNTS}", "[layers, experts] or [steps, layers, experts]"
    value = content[_COUNTS]
    ndim = 3 if _depth(value) == 3 else 2
    counts = to_array(value, ndim, words, where).astype(np.int64)
    if (counts < 0).any():
        raise ValueError(f"{where}: negative count {counts.min()}")
    return counts if ndim == 2 else counts.sum(axis=0)


def _depth(value: Any) -> int:
    if isinstance(value, list):
        return 1 + (_depth(value[0]) if value else 0)
    return int(getattr(value, "ndim", 0))


def _read(path: Path) -> Any:
    if path.suffix == ".npy":
        return read_npy(path)
    if path.suffix == ".json":
        return read_json(path, read_text(path))
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle or archive ends in almost any exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path}: not a torch file of tensors and plain values, or cut short: {reason}"
        ) from None


def _id_arrays(content: Any, path: Path) -> list[tuple[str, npt.NDArray[Any]]]:
    """Return (place, ``[layers, tokens, K]``) for every record."""
    words = "[layers, tokens, top_k]"
    if not isinstance(content, dict):
        return [(f"{path}: array", to_array(content, 3, words, f"{path}: array"))]
    if _IDS in content:
        return [(f"{path}: {_IDS}", to_array(content[_IDS], 3, words, f"{path}: {_IDS}"))]
    if _COUNTS in content:
        raise ValueError(
            f"{path}: holds {_COUNTS!r}, counts without tokens; use it as a load profile"
        )
    records = content.get("records")
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path}: field 'records' is missing or empty")
    arrays = []
    for i, record in enumerate(records):
        place = f"{path}: records[{i}]"
        if not isinstance(record, dict) or _IDS not in record:
            raise ValueError(f"{place}: field {_IDS!r} is missing (recorder mode per_token?)")
        array = to_array(record[_IDS], 3, words, f"{place}: {_IDS}")
        if array.shape[1]:  # a pass without tokens says nothing, not even its K in JSON
            arrays.append((place, array))
    if not arrays:
        raise ValueError(f"{path}: no record has tokens")
    return arrays
