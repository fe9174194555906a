"""vLLM routed experts (``--enable-return-routed-experts``) saved with ``numpy.save``.

One integer array ``[tokens, MoE layers, top_k]``; int16 as documented, narrower or wider integers
by version. Dense layers are not counted: layer 0 is the first MoE layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .trace_common import RoutingTrace, check_ids, check_layer, to_array


def read_npy(path: Path) -> npt.NDArray[Any]:
    """Map an .npy file; ValueError names the file when it is damaged."""
    try:
        return np.load(path, allow_pickle=False, mmap_mode="r")
    except OSError:
        raise
    except Exception as error:  # numpy's header parser raises many kinds, tokenize's among them
        raise ValueError(f"{path}: not an .npy file, or cut short: {error}") from None


def read_vllm(path: Path, layer: int | None, num_experts: int | None) -> RoutingTrace:
    """Read one layer; see ``load_trace``."""
    ids_TLK = to_array(read_npy(path), 3, "[tokens, moe_layers, top_k]", f"{path}: array")
    layer = 0 if layer is None else layer
    check_layer(layer, ids_TLK.shape[1], path)
    ids_TK = check_ids(ids_TLK[:, layer], num_experts, f"{path}: array: layer {layer}")
    return RoutingTrace(torch.from_numpy(ids_TK), None, num_experts, layer, str(path))
