"""torch's profiler, which knows the activity HPU: here it is the host's.

As the real plugin does (activity_profiler/activity_profiler.py), this takes the place of `torch.profiler.profile`.
"""

from collections.abc import Iterable
from enum import Enum

import torch
from torch.profiler import ProfilerActivity


class DebugActivity(Enum):
    """What of the plugin itself a card's trace shows."""

    SYNAPSE_FUNCTION_CALLS = 1
    BRIDGE_FUNCTION_CALLS = 2


class HostProfile(torch.profiler.profile):
    def __init__(
        self,
        *,
        activities: Iterable[ProfilerActivity] | None = None,
        debug_activities: Iterable[DebugActivity] | None = None,
        **options,
    ):
        wanted = set(activities or ()) - {ProfilerActivity.HPU} or {ProfilerActivity.CPU}
        super().__init__(activities=wanted, **options)


torch.profiler.profile = HostProfile
