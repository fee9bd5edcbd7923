"""What a run leaves to be looked at: logs, JSON files, curves."""

import logging
import os
from collections.abc import Mapping, Sequence

from transformers import Trainer

from align import __version__

logger = logging.getLogger(__name__)


def save_results(trainer: Trainer, name: str, metrics: dict[str, float]) -> None:
    """Writes `{name}_results.json` and adds to `all_results.json` (rank 0)."""
    trainer.log_metrics(name, metrics)
    trainer.save_metrics(name, {**metrics, "version": __version__})


def save_history(trainer: Trainer, panels: Mapping[str, Sequence[str]]) -> None:
    """Writes all that was logged to `trainer_state.json` and draws it into `curves.png` (rank 0).

    `panels` names the metrics of each panel, which shows them for training and evaluation.
    """
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name in [prefix + name for name in names for prefix in ("", "eval_")]:
            points = [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]
            if points:
                axes.plot(
                    *zip(*points, strict=True), label=name, marker="o" if len(points) < 30 else None, markersize=3
                )
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    path = os.path.join(trainer.args.output_dir, "curves.png")
    figure.savefig(path, dpi=120)
    logger.info(f"curves: {path}")
