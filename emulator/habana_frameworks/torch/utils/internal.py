import functools
import os
from collections.abc import Callable


@functools.cache
def is_lazy() -> bool:
    """Lazy mode is on unless PT_HPU_LAZY_MODE says 0 when it is first asked for."""
    return os.environ.get("PT_HPU_LAZY_MODE", "1") != "0"


def lazy_only(function: Callable) -> Callable:
    """`function`, which does nothing in eager mode, and returns nothing in either."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if is_lazy():
            function(*args, **kwargs)

    return wrapper
