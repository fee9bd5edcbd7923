"""Memory figures, in bytes: the process's resident set in place of what it holds on a card."""

import os
import warnings
from pathlib import Path

from habana_frameworks.torch.hpu._utils import require_device

__all__ = [
    "max_memory_allocated",
    "max_memory_cached",
    "max_memory_reserved",
    "mem_get_info",
    "memory_allocated",
    "memory_cached",
    "memory_reserved",
    "memory_stats",
    "memory_summary",
    "reset_accumulated_memory_stats",
    "reset_peak_memory_stats",
]

ALLOCATIONS = ("NumAllocs", "NumFrees", "ActiveAllocs", "MaxAllocSize")
ALLOCATIONS += ("TotalSystemAllocs", "TotalSystemFrees", "TotalActiveAllocs")
PAGE = os.sysconf("SC_PAGE_SIZE")


def memory_stats(device=None) -> dict[str, int]:
    """`InUse` and `MaxInUse` (since the last reset) of this process, `Limit` of the host; allocations count as 0."""
    require_device(device)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    in_use, peak = (int(status[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    sizes = {"Limit": os.sysconf("SC_PHYS_PAGES") * PAGE, "InUse": in_use, "MaxInUse": max(peak, in_use)}
    return sizes | dict.fromkeys(ALLOCATIONS, 0)


def memory_summary(device=None) -> str:
    return "".join(f"  {name + ':':18} {size:20d}\n" for name, size in memory_stats(device).items())


def memory_allocated(device=None) -> int:
    return memory_stats(device)["InUse"]


def max_memory_allocated(device=None) -> int:
    return memory_stats(device)["MaxInUse"]


def reset_peak_memory_stats(device=None) -> None:
    require_device(device)
    Path("/proc/self/clear_refs").write_text("5")  # Linux's way to make VmHWM start again from VmRSS


def reset_accumulated_memory_stats(device=None) -> None:
    """Allocations are not counted here."""
    require_device(device)


def memory_reserved(device=None) -> int:
    """A card's process holds all of its memory."""
    return memory_stats(device)["Limit"]


max_memory_reserved = memory_reserved


def memory_cached(device=None) -> int:
    warnings.warn("torch.hpu.memory_cached has been renamed to torch.hpu.memory_reserved", FutureWarning, stacklevel=2)
    return memory_reserved(device)


def max_memory_cached(device=None) -> int:
    warnings.warn(
        "torch.hpu.max_memory_cached has been renamed to torch.hpu.max_memory_reserved", FutureWarning, stacklevel=2
    )
    return max_memory_reserved(device)


def mem_get_info(device=None) -> tuple[int, int]:
    """Free and total."""
    stats = memory_stats(device)
    return stats["Limit"] - stats["InUse"], stats["Limit"]
