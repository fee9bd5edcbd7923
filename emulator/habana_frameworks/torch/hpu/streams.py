"""Streams and events of a device on which every operation has ended when it returns."""

import contextlib
import time

__all__ = [
    "Event",
    "Stream",
    "current_stream",
    "default_stream",
    "stream",
    "synchronize",
]


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False):
        self.time: float | None = None

    def record(self, stream: "Stream | None" = None) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds between two recorded events."""
        if self.time is None or end.time is None:
            raise RuntimeError("both events must be recorded before their distance can be told")
        return (end.time - self.time) * 1000

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Nothing is under way."""

    def wait(self, stream: "Stream | None" = None) -> None:
        """Nothing is under way."""


class Stream:
    def __init__(self, device=None, priority: int = 0):
        pass

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exception) -> None:
        pass

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Nothing is under way."""

    def wait_event(self, event: Event) -> None:
        """Nothing is under way."""

    def wait_stream(self, stream: "Stream") -> None:
        """Nothing is under way."""


_DEFAULT_STREAM = Stream()


def default_stream(device=None) -> Stream:
    return _DEFAULT_STREAM


current_stream = default_stream


def stream(stream: Stream | None) -> contextlib.AbstractContextManager:
    return stream or contextlib.nullcontext()


def synchronize(device=None) -> None:
    """Nothing is under way."""
