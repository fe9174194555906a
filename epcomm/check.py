"""Checks of what users pass: what came, what was expected, before anything is sent."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from .backend import CombineCall, Config, DispatchCall
from .bootstrap import Bootstrap, MpiBootstrap
from .formats.wire import WireFormat
from .native import constants
from .results import Handle

_QUANTIZE = {"fp8": WireFormat.FP8, "fp8_ue8m0": WireFormat.FP8_UE8M0}
_WIRE = {
    "f32": WireFormat.F32,
    "bf16": WireFormat.BF16,
    "logfmt8": WireFormat.LOGFMT8,
    "logfmt10": WireFormat.LOGFMT10,
}
_LAYOUTS = ("rank", "expert")
_PAIRS = (tuple, list)  # a union of them would be made anew by every call
_ROW_ALIGN = constants["limit_row_align"]
_TILE = constants["limit_tile"]
_ROWS = (torch.bfloat16, torch.float32)
_WEIGHTS = (torch.float32,)
_INDICES = (torch.int64, torch.int32)
_CODES = (torch.float8_e4m3fn,)
_SCALES = (torch.float32, torch.int32)


def check_config(config: Config, num_ranks: int) -> None:
    """Check a Buffer's arguments against the protocol's limits.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is out of range.
    """
    for name in ("hidden", "num_experts", "num_topk", "max_tokens"):
        limit = constants["limit_max_" + name.removeprefix("num_").removeprefix("max_")]
        check_int(name, getattr(config, name), 0 if name == "max_tokens" else 1, limit)
    unit = constants["limit_row_align"] // 2
    if config.hidden % unit:
        raise ValueError(
            f"hidden: {config.hidden} BF16 elements are not a whole number of "
            f"{constants['limit_row_align']}-byte units; expected a multiple of {unit}"
        )
    if config.num_experts % num_ranks:
        raise ValueError(
            f"num_experts: {config.num_experts} experts cannot be shared equally by "
            f"{num_ranks} ranks"
        )
    if config.num_topk > config.num_experts:
        raise ValueError(f"num_topk: {config.num_topk} exceeds num_experts={config.num_experts}")
    if config.max_staging_bytes is not None:
        check_int("max_staging_bytes", config.max_staging_bytes, 1, 2**62)
        if config.device == "cpu":
            raise ValueError(
                "max_staging_bytes: only backend 'cuda' can bound its staging between nodes; "
                "expected None"
            )
    rows = num_ranks * config.max_tokens * min(config.num_topk, config.num_experts // num_ranks)
    if rows >= 2**31:
        raise ValueError(
            f"max_tokens: {num_ranks} ranks of {config.max_tokens} tokens make up to {rows} rows "
            "on one rank; row numbers are 32 bits wide"
        )


_FABRICS = ("auto", "mpi", "proxy/local", "proxy/verbs", "proxy/emulated", "emulated", "ibgda")
#: Those of each back end.
_FABRICS_OF = {
    "cpu": ("auto", "mpi", "proxy/local", "proxy/verbs", "proxy/emulated"),
    "cuda": ("auto", "ibgda", "proxy/verbs", "proxy/local", "emulated", "proxy/emulated"),
}
#: Those without options of their own.
_PLAIN_FABRICS = ("auto", "mpi")


def check_fabric(fabric: Any, backend: str, bootstrap: Bootstrap | None = None) -> None:
    """Check the choice of what carries messages between nodes; without a group, but for that.

    Raises:
        ValueError: it is unknown, or not for this group or back end.
    """
    # A transport's own options may follow.
    name, _, arguments = str(fabric).partition(" ")
    if name not in _FABRICS or (arguments and name in _PLAIN_FABRICS):
        raise ValueError(f"fabric: expected one of {', '.join(_FABRICS)}, got {fabric!r}")
    known = _FABRICS_OF["cuda" if backend == "cuda" else "cpu"]
    if name not in known:
        raise ValueError(
            f"fabric: expected one of {', '.join(known)} for backend {backend!r}, got {fabric!r}"
        )
    if fabric == "mpi" and bootstrap is not None and not isinstance(bootstrap, MpiBootstrap):
        raise ValueError("fabric: 'mpi' needs an mpi4py communicator as group")


def check_tensor(
    name: str,
    value: Any,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | None],
    *,
    device: str = "cpu",
) -> torch.Tensor:
    """Check a tensor argument; None in ``shape`` admits any extent. Returns it detached.

    An array of another library in GPU memory, such as CuPy's, is adopted without a copy.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape, device or memory layout.
    """
    tensor = value if isinstance(value, torch.Tensor) else _adopt(value)
    # The questions that tell whether anything is wrong are fewer than those that tell what.
    if (
        tensor is not None
        and tensor.dtype in dtypes
        and ((got := tensor.shape) == shape or _has_shape(got, shape))
        and tensor.device == _device(device)
        and tensor.is_contiguous()
    ):
        return tensor.detach() if tensor.requires_grad else tensor
    raise _tensor_error(name, value if tensor is None else tensor, dtypes, shape, device)


def _adopt(value: Any) -> torch.Tensor | None:
    """A tensor over an array of another library in GPU memory; None: it is no such array."""
    return torch.from_dlpack(value) if hasattr(value, "__cuda_array_interface__") else None


_device = cache(torch.device)


def _has_shape(got: Sequence[int], want: Sequence[int | None]) -> bool:
    if len(got) != len(want):
        return False
    if len(got) == 2:  # nearly always, and a loop takes four times as long
        return (got[0] == want[0] or want[0] is None) and (got[1] == want[1] or want[1] is None)
    return all(w is None or g == w for g, w in zip(got, want, strict=True))


def _tensor_error(
    name: str,
    value: Any,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | None],
    device: str,
) -> Exception:
    """What is wrong with a tensor."""
    if not isinstance(value, torch.Tensor):
        return TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        return TypeError(f"{name}: expected dtype {expected}, got {str(value.dtype)[6:]}")
    if not _has_shape(value.shape, shape):
        expected = ", ".join("*" if want is None else str(want) for want in shape)
        return ValueError(f"{name}: expected shape [{expected}], got {list(value.shape)}")
    if value.device != torch.device(device):
        return ValueError(f"{name}: expected a tensor on {device}, got one on {value.device}")
    return ValueError(
        f"{name}: expected a contiguous tensor, got strides {list(value.stride())}; "
        "pass .contiguous()"
    )


def check_rows(
    name: str,
    value: Any,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | None],
    config: Config,
) -> torch.Tensor:
    """Check a tensor of whole rows, which GPUs move 16 bytes at a time.

    Raises:
        TypeError, ValueError: as check_tensor; its memory starts between two units.
    """
    rows = check_tensor(name, value, dtypes, shape, device=config.device)
    if config.device != "cpu" and rows.data_ptr() % _ROW_ALIGN:
        raise ValueError(
            f"{name}: expected memory that starts at a multiple of {_ROW_ALIGN} bytes, got one "
            f"{rows.data_ptr() % _ROW_ALIGN} bytes after one; pass {name}.clone()"
        )
    return rows


def check_handle(handle: Any, owner: object) -> Handle:
    """Check that a handle may be used on this buffer.

    Raises:
        TypeError: not a Handle.
        ValueError: of another buffer, or released.
    """
    if not isinstance(handle, Handle):
        raise TypeError(f"handle: expected an epcomm Handle, got {type(handle).__name__}")
    if handle._owner is not owner:
        raise ValueError("handle: it belongs to another buffer")
    if handle._state is None:
        raise ValueError("handle: it was released and cannot be used any more")
    return handle


def _check_packed(x: Any, config: Config) -> tuple[torch.Tensor, torch.Tensor, WireFormat, int]:
    if len(x) != 2:
        raise TypeError(f"x: expected a tensor or a pair (x, scales), got a tuple of {len(x)}")
    q = check_rows("x[0]", x[0], _CODES, (None, config.hidden), config)
    num_tokens, scales = q.shape[0], x[1]
    words, packed = -(-config.hidden // _TILE), WireFormat.FP8
    tensor = scales if isinstance(scales, torch.Tensor) else _adopt(scales)
    if tensor is not None:
        scales = tensor
        if tensor.dtype is torch.int32:
            words, packed = -(-words // 4), WireFormat.FP8_UE8M0  # four exponents to one
    shape = (num_tokens, words)
    scales = check_tensor("x[1] (scales)", scales, _SCALES, shape, device=config.device)
    return q, scales, packed, num_tokens


def row_format(dtype: torch.dtype, quantize: Any) -> WireFormat:
    """Format in which rows of ``dtype`` travel.

    Raises:
        ValueError: ``quantize`` is not known.
    """
    if quantize is None:
        return WireFormat.BF16 if dtype == torch.bfloat16 else WireFormat.F32
    if quantize not in list(_QUANTIZE):  # of any type, hashable or not
        raise ValueError(f"quantize: expected None or one of {list(_QUANTIZE)}, got {quantize!r}")
    return _QUANTIZE[quantize]


def _check_rows(
    x: Any, quantize: str | None, config: Config
) -> tuple[torch.Tensor, torch.Tensor | None, WireFormat, int]:
    """(rows, scales, format of the rows that travel, their number)."""
    scales = None
    if isinstance(x, _PAIRS):
        if quantize is not None:
            raise ValueError(f"quantize: {quantize!r} given, but x is packed already")
        rows, scales, fmt, num_tokens = _check_packed(x, config)
    else:
        rows = check_rows("x", x, _ROWS, (None, config.hidden), config)
        fmt = row_format(rows.dtype, quantize)
        num_tokens = rows.shape[0]
    if num_tokens > config.max_tokens:
        raise ValueError(
            f"x: {num_tokens} tokens exceed the buffer's max_tokens={config.max_tokens}"
        )
    check_row(fmt, config.hidden)
    return rows, scales, fmt, num_tokens


@cache
def check_row(fmt: WireFormat, hidden: int) -> None:
    """Check that a row is a whole number of units in a format. Raises ValueError."""
    row_bytes = fmt.payload_bytes(hidden)
    if row_bytes % constants["limit_row_align"]:
        raise ValueError(
            f"x: a row of {hidden} elements takes {row_bytes} bytes in {fmt.name}; expected "
            f"a multiple of {constants['limit_row_align']} (hidden a multiple of 16 for FP8)"
        )


def check_layout(layout: Any) -> None:
    """Check the name of a layout. Raises ValueError."""
    if layout not in _LAYOUTS:
        raise ValueError(f"layout: expected one of {list(_LAYOUTS)}, got {layout!r}")


def check_dispatch(
    config: Config,
    owner: object,
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    *,
    quantize: Any,
    layout: Any,
    alignment: Any,
    fixed_rows: Any,
    handle: Any,
) -> DispatchCall:
    """Check the arguments of Buffer.dispatch, which documents them.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    rows, scales, fmt, num_tokens = _check_rows(x, quantize, config)
    choices = (num_tokens, config.num_topk)
    if topk_weights is not None:
        topk_weights = check_tensor(
            "topk_weights", topk_weights, _WEIGHTS, choices, device=config.device
        )
    if handle is not None:
        check_handle(handle, owner)
        if topk_idx is not None:
            raise ValueError("topk_idx: expected None with a handle, whose routes are used")
        if num_tokens != handle.num_tokens:
            raise ValueError(
                f"x: {num_tokens} tokens, but the handle's dispatch had {handle.num_tokens}"
            )
        routes = handle._state
        fixed = None if routes.fixed_rows < 0 else routes.fixed_rows
        return DispatchCall(
            rows, scales, fmt, None, topk_weights, handle.layout, routes.alignment, fixed, handle
        )
    check_layout(layout)
    topk_idx = check_tensor("topk_idx", topk_idx, _INDICES, choices, device=config.device)
    check_int("alignment", alignment, 1, constants["limit_max_alignment"])
    if layout == "rank" and alignment != 1:
        raise ValueError(f"alignment: {alignment} given, but only layout 'expert' has padding")
    if fixed_rows is not None:
        check_int("fixed_rows", fixed_rows, 0, 2**31 - 1)
    return DispatchCall(
        rows, scales, fmt, topk_idx, topk_weights, layout, alignment, fixed_rows, None
    )


def check_int(name: str, value: Any, lowest: int, highest: int) -> None:
    """Check an integer argument. Raises TypeError or ValueError."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not lowest <= value <= highest:
        raise ValueError(f"{name}: {value} is not in {lowest}..{highest}")


def check_combine(
    config: Config,
    owner: object,
    x: Any,
    handle: Any,
    *,
    weights: Any,
    topk_weights: Any,
    bias: Any,
    wire: Any,
    out: Any,
) -> CombineCall:
    """Check the arguments of Buffer.combine, which documents them.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_handle(handle, owner)
    received = (handle.num_rows, config.hidden)
    rows = check_rows("x", x, _ROWS, received, config)
    if weights is not None:
        weights = check_tensor(
            "weights", weights, _WEIGHTS, (handle.num_rows,), device=config.device
        )
    if topk_weights is not None:
        by_expert = handle.layout == "expert"
        shape = (handle.num_rows,) if by_expert else (handle.num_rows, config.num_topk)
        topk_weights = check_tensor(
            "topk_weights", topk_weights, _WEIGHTS, shape, device=config.device
        )
    result = (handle.num_tokens, config.hidden)
    biases: tuple[torch.Tensor, ...] = ()
    if bias is not None:
        biases = tuple(bias) if isinstance(bias, _PAIRS) else (bias,)
        if len(biases) > 2:
            raise ValueError(f"bias: expected at most two tensors, got {len(biases)}")
        biases = tuple(check_rows("bias", one, (rows.dtype,), result, config) for one in biases)
    if out is not None:
        out = check_rows("out", out, (rows.dtype,), result, config)
    if wire is None:
        fmt = WireFormat.BF16 if rows.dtype is torch.bfloat16 else WireFormat.F32
    elif wire in list(_WIRE):  # of any type, hashable or not
        fmt = _WIRE[wire]
    else:
        raise ValueError(f"wire: expected one of {list(_WIRE)}, got {wire!r}")
    return CombineCall(rows, handle, weights, topk_weights, biases, fmt, out)
