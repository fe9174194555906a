"""A CUDA buffer of one rank without a GPU: host memory, and a library whose launches are noted.

All that needs a device is replaced; the Python between a user's call and a launch is the real one,
and so are the library's structures and the tensors made of windows.
"""

import ctypes
import importlib
import sys
import types
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from epcomm import native
from epcomm.cuda import abi

RANKS, RANK = 4, 1
TOKENS, HIDDEN, TOPK = 6, 256, 3
WORDS = (HIDDEN + 127) // 128
#: Streams of the stand-in for torch.cuda, by address.
_STREAMS: dict[int, "Stream"] = {}


class Stream:
    """Stands for torch.cuda.Stream."""

    def __init__(self, device: Any = None, address: int | None = None) -> None:
        self.cuda_stream = 1000 + len(_STREAMS) if address is None else address
        self.synchronized = 0
        _STREAMS[self.cuda_stream] = self

    def synchronize(self) -> None:
        self.synchronized += 1


@dataclass
class Launch:
    """A launch of a kernel with its parameters (``epcomm_cuda_dispatch`` or ``_combine``)."""

    name: str
    block: Any
    stream: int
    event: int

    @property
    def announcement(self) -> Any:
        return self.block.announcement

    @property
    def number(self) -> int:
        return self.block.number


@dataclass
class Gpu:
    """What the library would do on a GPU, and what it was asked for.

    Attributes:
        rows: that the next first dispatches report for this rank and the fullest.
        verdicts: of the next calls judged; then OK, or GROW where no window was announced.
        free_windows: of the rank that has fewest; None: of this one.
        behind: calls launched but not judged until the host waits for one of them.
        capturing: whether streams are.
        sms_of_calls: that calls of all its ranks hold.
        copies_of_token: that a dispatch makes.
        copies_in_bulk: whether it has the bulk copy engine.
        held_sms: of the buffers made, by GPU.
    """

    rows: tuple[int, int] = (5, 7)
    verdicts: list[str] = field(default_factory=list)
    free_windows: int | None = None
    behind: int = 0
    capturing: bool = False
    sms_of_calls: int = 64
    copies_of_token: float = 5.25
    copies_in_bulk: bool = True
    held_sms: Counter[str] = field(default_factory=Counter)
    launches: list[Launch] = field(default_factory=list)
    copies: list[tuple[int, int, int, int]] = field(default_factory=list)
    ordered: list[tuple[int, int]] = field(default_factory=list)
    kept: list[tuple[int, int]] = field(default_factory=list)  # tensors' addresses, by stream
    waited_for: list[int] = field(default_factory=list)  # numbers of calls, by the host
    events: set[int] = field(default_factory=set)
    stream: int = 0  # the caller's current one
    clocks: tuple[int, int, int] = (0, 0, 0)  # the GPU's, the host's, the error
    memory: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def waited(self) -> int:
        return len(self.waited_for)

    def allocate(self, num_bytes: int) -> int:
        array = np.zeros(num_bytes + 256, np.uint8)
        address = -(-array.ctypes.data // 256) * 256
        self.memory[address] = array
        return address


class Library:
    """libepcomm, but for what calls CUDA."""

    def __init__(self, gpu: Gpu, real: Any) -> None:
        self.gpu, self._real = gpu, real
        self._next_event = 1
        self._unjudged: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def _note(self, name: str, address: int, sequence: int, stream: int) -> int:
        structure = abi.structures[name]
        block = structure.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(structure)))
        event = abi.structures["sequence"].from_address(sequence).next
        self.gpu.launches.append(Launch(name, block, stream, event))
        self._unjudged.append(block)
        while len(self._unjudged) > self.gpu.behind:
            self._judge(self._unjudged.pop(0))
        return 0

    def _judge(self, block: Any) -> None:
        """What the kernels would report of this call."""
        announcement = block.announcement
        verdict = "OK" if announcement.window_bytes else "GROW"
        if self.gpu.verdicts:
            verdict = self.gpu.verdicts.pop(0)
        report = abi.structures["report"].from_address(block.world.report)
        report.prepared, report.epoch = block.number, block.number
        report.verdict = abi.constants[verdict]
        report.rows, report.max_rows = self.gpu.rows
        report.bad_choice = -1
        free = self.gpu.free_windows
        free = announcement.window_fd if free is None else free
        report.free_windows = block.number << abi.constants["FREE_BITS"] | free
        if verdict not in ("OK", "GROW"):
            report.refusals += 1

    def epcomm_cuda_load(self) -> int:
        return 0

    def epcomm_cuda_sequence_open(self, sequence: int) -> int:
        return 0

    def epcomm_cuda_sequence_close(self, sequence: int) -> None:
        pass

    def epcomm_cuda_enter(self, sequence: int, stream: int, capture: int) -> int:
        ctypes.c_uint64.from_address(capture).value = int(self.gpu.capturing)
        return 0

    def epcomm_cuda_order(self, first: int, then: int) -> int:
        self.gpu.ordered.append((first, then))
        return 0

    def epcomm_cuda_copy(self, to: int, source: int, num_bytes: int, stream: int) -> int:
        self.gpu.copies.append((to, source, num_bytes, stream))
        return 0

    def epcomm_cuda_launch_dispatch(self, call: int, sequence: int, stream: int) -> int:
        return self._note("dispatch", call, sequence, stream)

    def epcomm_cuda_launch_combine(self, call: int, sequence: int, stream: int) -> int:
        return self._note("combine", call, sequence, stream)

    def epcomm_cuda_wait_prepared(self, report: int, number: int, timeout_ns: int) -> int:
        while self._unjudged and self._unjudged[0].number <= number:
            self._judge(self._unjudged.pop(0))
        assert abi.structures["report"].from_address(report).prepared >= number
        self.gpu.waited_for.append(number)
        return 0

    def epcomm_cuda_event_open(self, event: Any) -> int:
        self.gpu.events.add(self._next_event)
        event._obj.value = self._next_event
        self._next_event += 1
        return 0

    def epcomm_cuda_event_close(self, event: int) -> int:
        self.gpu.events.remove(event)
        return 0

    def epcomm_cuda_event_record(self, event: int, stream: int) -> int:
        assert event in self.gpu.events
        return 0

    def epcomm_cuda_compare_clocks(self, ns: Any, host_ns: Any, error_ns: Any) -> int:
        ns._obj.value, host_ns._obj.value, error_ns._obj.value = self.gpu.clocks
        return 0

    def epcomm_cuda_loan_open(self, memory: int, device: int) -> int:
        return self._real.epcomm_cuda_loan_open(memory, -1)


class _Array:
    """Stands for cupy.ndarray."""

    def __init__(self, address: int, shape: Any = (), dtype: Any = np.uint8) -> None:
        self.data = types.SimpleNamespace(ptr=address)
        self._values = np.empty(shape, dtype)  # for its shape

    def set(self, values: np.ndarray) -> None:
        ctypes.memmove(self.data.ptr, values.ctypes.data, values.nbytes)

    def get(self) -> np.ndarray:
        ctypes.memmove(self._values.ctypes.data, self.data.ptr, self._values.nbytes)
        return self._values.copy()

    def fill(self, value: int) -> None:
        if self.data.ptr != 0:  # of a block of the device's, which nobody looks at
            self.set(np.full_like(self._values, value))


def _fake_cupy(gpu: Gpu) -> dict[str, types.ModuleType]:
    cupy, cuda, runtime = (types.ModuleType(n) for n in ("cupy", "cupy.cuda", "cupy.cuda.runtime"))

    def zeros(shape: Any, dtype: Any) -> _Array:
        return _Array(gpu.allocate(int(np.prod(shape)) * np.dtype(dtype).itemsize), shape, dtype)

    def asarray(values: np.ndarray) -> _Array:
        array = zeros(values.shape, values.dtype)
        array.set(values)
        return array

    cupy.__dict__.update(
        cuda=cuda, zeros=zeros, empty=zeros, asarray=asarray, ndarray=lambda *_: _Array(0)
    )
    cuda.__dict__.update(
        runtime=runtime,
        UnownedMemory=lambda *_: None,
        MemoryPointer=lambda *_: None,
        Device=lambda _: types.SimpleNamespace(use=lambda: None),
    )
    runtime.__dict__.update(
        malloc=gpu.allocate,
        hostAlloc=lambda n, _: gpu.allocate(n),
        free=lambda _: None,
        freeHost=lambda _: None,
        memset=lambda to, value, n: ctypes.memset(to, value, n) if to else None,
        memcpy=lambda to, source, n, _: ctypes.memmove(to, source, n),
        deviceSynchronize=lambda: None,
        memcpyDeviceToHost=2,
        ipcGetMemHandle=lambda address: address.to_bytes(8, "little"),
        ipcOpenMemHandle=lambda handle: int.from_bytes(handle, "little"),
        ipcCloseMemHandle=lambda _: None,
        CUDARuntimeError=type("CUDARuntimeError", (RuntimeError,), {}),
    )
    return {"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.runtime": runtime}


class _Bootstrap:
    """All ranks say what this one says."""

    rank, size = RANK, RANKS

    def allgather(self, item: Any) -> list[Any]:
        return [item] * RANKS

    def hosts(self) -> list[object]:
        return ["here"] * RANKS

    def close(self) -> None:
        pass


def inputs(form: str = "bf16") -> Any:
    """Rows to dispatch, or a pair."""
    if form == "pair":
        rows = torch.zeros(TOKENS, HIDDEN, dtype=torch.float8_e4m3fn)
        return rows, torch.zeros(TOKENS, WORDS)
    if form == "ue8m0 pair":
        rows = torch.zeros(TOKENS, HIDDEN, dtype=torch.float8_e4m3fn)
        return rows, torch.zeros(TOKENS, 1, dtype=torch.int32)
    return torch.zeros(TOKENS, HIDDEN, dtype=torch.float32 if form == "f32" else torch.bfloat16)


def choices(dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Experts of every token."""
    return torch.arange(TOKENS * TOPK, dtype=dtype).view(TOKENS, TOPK) % 16


def make_buffer(monkeypatch: Any, gpu: Gpu, **config: Any) -> Any:
    """A Buffer of rank RANK of RANKS on one node, on tensors of the host.

    The modules that it uses are imported anew, and forgotten when ``monkeypatch`` is undone.
    """
    import epcomm.buffer
    import epcomm.cuda

    for name in _modules():
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(epcomm.cuda, name.rpartition(".")[2], raising=False)
    for name, module in _fake_cupy(gpu).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(native, "library", Library(gpu, native.library))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    current = lambda device=None: _STREAMS.get(gpu.stream) or Stream(address=gpu.stream)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda t, s: gpu.kept.append((t.data_ptr(), s.cuda_stream))
    )
    backend = importlib.import_module("epcomm.cuda.backend")
    streams = importlib.import_module("epcomm.cuda.streams")
    device = importlib.import_module("epcomm.cuda.device")
    monkeypatch.setattr(streams, "_find_stream", lambda _: gpu.stream)
    gpu.held_sms = device._claimed

    def check_device(*_: Any) -> Any:
        gpu.held_sms["a GPU"] += 16
        return device.Device(
            *(0, "a GPU"),
            num_sms=16,
            max_sms=132,
            sms_of_calls=gpu.sms_of_calls,
            copies=gpu.copies_of_token,
            copies_in_bulk=gpu.copies_in_bulk,
        )

    monkeypatch.setattr(backend, "check_device", check_device)
    monkeypatch.setattr(epcomm.buffer, "make_bootstrap", lambda *_: _Bootstrap())
    try:
        sizes = {"hidden": HIDDEN, "num_experts": 16, "num_topk": TOPK, "max_tokens": 64}
        buffer = epcomm.buffer.Buffer(None, **sizes | config, backend="cuda")
    finally:
        for name in _modules():
            # Of this buffer alone: the next one, or a test with a GPU, imports its own.
            del sys.modules[name]
            delattr(epcomm.cuda, name.rpartition(".")[2])
    buffer.config = replace(buffer.config, device="cpu")
    buffer._backend._combines._device = torch.device("cpu")
    return buffer


def _modules() -> list[str]:
    """Names of the back end's modules, but for the one that knows the library's structures."""
    return [n for n in sys.modules if n.startswith("epcomm.cuda.") and n != abi.__name__]
