"""Streams and events of a device on which every operation has ended when it returns.

Waiting for the card, or recording an event, ends a lazy graph (backend/habana_device/HPUStream.cpp, HPUEvent.cpp).
"""

import itertools
import threading
import time

import torch

from habana_frameworks.emulator import graph_counter
from habana_frameworks.torch.utils.internal import is_lazy

__all__ = [
    "Event",
    "Stream",
    "StreamContext",
    "current_stream",
    "default_stream",
    "record_stream",
    "set_stream",
    "stream",
    "synchronize",
]


def _end_lazy_graph() -> None:
    if is_lazy():
        graph_counter.end_lazy_graph()


class Event:
    def __init__(self, enable_timing: bool = False):
        self.enable_timing = enable_timing
        self.time: float | None = None

    def record(self, stream: "Stream | None" = None) -> None:
        if stream in (None, current_stream()):
            _end_lazy_graph()
        self.time = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds between two recorded events."""
        if self.time is None or end.time is None:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        if not (self.enable_timing and end.enable_timing):
            raise RuntimeError("synEventElapsedTime failed: both events need enable_timing=True")
        return (end.time - self.time) * 1000

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Nothing is under way."""

    def wait(self, stream: "Stream | None" = None) -> None:
        """Nothing is under way."""


class Stream:
    """One of the card's streams; 0 is the default one."""

    numbers = itertools.count(1)
    device_type = "hpu"

    def __init__(
        self,
        device=None,
        priority: int = 0,
        *,
        stream_id: int | None = None,
        device_index: int = 0,
        device_type: int = 0,
        is_default_stream: bool = False,
    ):
        self.priority, self.device_index = priority, device_index
        self.stream_id = 0 if is_default_stream else next(self.numbers) if stream_id is None else stream_id
        self._within: list[StreamContext] = []

    @property
    def device(self) -> torch.device:
        return torch.device("hpu", self.device_index)

    @property
    def hpu_stream(self) -> int:
        return self.stream_id

    def id(self) -> int:
        return self.stream_id

    def __eq__(self, other) -> bool:
        return isinstance(other, Stream) and self.stream_id == other.stream_id

    def __hash__(self) -> int:
        return hash((self.hpu_stream, self.device))

    def __repr__(self) -> str:
        return f"<torch.hpu.Stream device={self.device} hpu_stream={self.hpu_stream:#x}>"

    def __enter__(self) -> "Stream":
        self._within.append(StreamContext(self))
        self._within[-1].__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._within.pop().__exit__(*exception)

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        _end_lazy_graph()

    def wait_event(self, event: Event) -> None:
        """Nothing is under way."""

    def wait_stream(self, stream: "Stream") -> None:
        """Nothing is under way."""


_DEFAULT_STREAM = Stream(is_default_stream=True)


class _Current(threading.local):
    stream = _DEFAULT_STREAM


_current = _Current()


def default_stream(device=None) -> Stream:
    return _DEFAULT_STREAM


def current_stream(device=None) -> Stream:
    return _current.stream


def set_stream(stream: Stream | None) -> None:
    if stream is not None:
        _current.stream = stream


class StreamContext:
    """What runs in here is the stream's; None changes nothing."""

    def __init__(self, stream: Stream | None):
        self.stream = stream

    def __enter__(self) -> Stream | None:
        self.before = current_stream()
        set_stream(self.stream)
        return self.stream

    def __exit__(self, *exception) -> None:
        set_stream(self.before)


def stream(stream: Stream | None) -> StreamContext:
    return StreamContext(stream)


def record_stream(self: torch.Tensor, stream: Stream) -> None:
    """Nothing is under way."""


def synchronize() -> None:
    _end_lazy_graph()
