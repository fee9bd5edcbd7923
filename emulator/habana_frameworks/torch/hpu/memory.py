"""Memory figures, in bytes: the process's resident set in place of what it holds on a card."""

import os
import warnings
from pathlib import Path

__all__ = [
    "max_memory_allocated",
    "max_memory_cached",
    "max_memory_reserved",
    "mem_get_info",
    "memory_allocated",
    "memory_cached",
    "memory_reserved",
    "memory_stats",
    "reset_accumulated_memory_stats",
    "reset_peak_memory_stats",
]

PAGE = os.sysconf("SC_PAGE_SIZE")


def memory_stats(device=None) -> dict[str, int]:
    """`InUse` and `MaxInUse` (since the last reset) of this process, `Limit` of the host."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    in_use, peak = (int(status[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return {"Limit": os.sysconf("SC_PHYS_PAGES") * PAGE, "InUse": in_use, "MaxInUse": max(peak, in_use)}


def memory_allocated(device=None) -> int:
    return memory_stats()["InUse"]


def max_memory_allocated(device=None) -> int:
    return memory_stats()["MaxInUse"]


def reset_peak_memory_stats(device=None) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # Linux's way to make VmHWM start again from VmRSS


def reset_accumulated_memory_stats(device=None) -> None:
    """Allocations are not counted here."""


def memory_reserved(device=None) -> int:
    """A card's process holds all of its memory."""
    return memory_stats()["Limit"]


max_memory_reserved = memory_reserved


def memory_cached(device=None) -> int:
    warnings.warn("torch.hpu.memory_cached has been renamed to torch.hpu.memory_reserved", FutureWarning, stacklevel=2)
    return memory_reserved()


def max_memory_cached(device=None) -> int:
    warnings.warn(
        "torch.hpu.max_memory_cached has been renamed to torch.hpu.max_memory_reserved", FutureWarning, stacklevel=2
    )
    return max_memory_reserved()


def mem_get_info(device=None) -> tuple[int, int]:
    """Free and total."""
    stats = memory_stats()
    return stats["Limit"] - stats["InUse"], stats["Limit"]
