"""Where one lazy graph ends and the next begins, and what is to be called there (core/step_closure.py)."""

from collections.abc import Callable

from habana_frameworks.emulator import graph_counter, metrics_file
from habana_frameworks.torch.utils.internal import is_lazy, lazy_only

_closures: list[tuple[Callable, tuple]] = []


@lazy_only
def add_step_closure(closure: Callable, args: tuple = ()) -> None:
    """`closure(*args)` is called at the next `mark_step`, once."""
    _closures.append((closure, args))


def _run_closures() -> None:
    closures = _closures.copy()
    _closures.clear()
    for closure, args in closures:
        closure(*args)


@lazy_only
def mark_step(device_str: str = "", sync: bool = False) -> None:
    """Ends the lazy graph. Here operations have run already; a graph counter, if one is active, notes the cut."""
    graph_counter.end_lazy_graph()
    if metrics_file.saver is not None:
        metrics_file.saver.mark_step()
    _run_closures()


@lazy_only
def iter_mark_step(device_str: str = "") -> None:
    graph_counter.end_lazy_graph()
    _run_closures()


def _mark_step_if_lazy(device_str: str = "") -> None:
    """The private hook through which DeepSpeed's optimizers end a lazy graph."""
    if is_lazy():
        mark_step(device_str)
