"""Runs one stage of a rehearsal: a script's own main() on a dry card, in a process that may not take much memory.

    python -m align.rehearsal.stage PLAN.json

The plan names the script, its arguments, and the file to write what was seen to. Several plans run one after the other.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

GIB = 1 << 30


def main() -> None:
    plans = json.loads(Path(sys.argv[1]).read_text())
    plans = plans if isinstance(plans, list) else [plans]
    limit = min((plan["memory_limit_gb"] for plan in plans if "memory_limit_gb" in plan), default=None)
    if limit is not None:  # of address space: a rehearsal fails alone and takes the host's memory from nobody
        resource.setrlimit(resource.RLIMIT_AS, (int(limit * GIB), int(limit * GIB)))
    for plan in plans:
        began, seen = time.monotonic(), {}
        try:
            import habana_frameworks.torch  # noqa: F401  before anything asks torch for a device
            from align.rehearsal.watching import watch

            watch(plan, seen)
        finally:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            seen["host"] = {"seconds": time.monotonic() - began, "memory_gb": usage.ru_maxrss / (1 << 20)}
            if os.environ.get("RANK", "0") == "0":
                Path(plan["seen"]).write_text(json.dumps(seen, indent=1))


if __name__ == "__main__":
    main()
