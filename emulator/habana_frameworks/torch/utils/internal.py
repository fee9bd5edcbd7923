import os


def is_lazy() -> bool:
    """Lazy mode is on unless PT_HPU_LAZY_MODE says 0."""
    return os.environ.get("PT_HPU_LAZY_MODE", "1") != "0"
