"""The private hook through which DeepSpeed's optimizers end a lazy graph."""

from habana_frameworks.emulator import graph_counter
from habana_frameworks.torch.utils.internal import is_lazy


def _mark_step_if_lazy() -> None:
    if is_lazy():
        graph_counter.end_lazy_graph()
