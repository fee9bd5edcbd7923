"""What a run leaves to be looked at: logs, JSON files, curves."""

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from align import __version__
from align.whole import write_file

logger = logging.getLogger(__name__)
# What a line of the log shows, and how; trainer_state.json has everything unrounded.
SHOWN = {
    "loss": "loss {:.4f}",
    "eval_loss": "evaluation loss {:.4f}",
    "rewards/margins": "margin {:.4f}",
    "eval_rewards/margins": "margin {:.4f}",
    "rewards/accuracies": "accuracy {:.3f}",
    "eval_rewards/accuracies": "accuracy {:.3f}",
    "grad_norm": "gradient norm {:.3g}",
    "learning_rate": "learning rate {:.3g}",
    "epoch": "epoch {:.2f}",
}


class ProgressBar(ProgressCallback):
    """The bar alone."""

    def on_log(self, *args, **kwargs) -> None:
        """`StepLines` tells it."""


class StepLines(TrainerCallback):
    """Prints a line of each entry of the log while training, rounded for the eye."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self.trainer.is_in_train and state.is_world_process_zero and "train_runtime" not in logs:
            shown = [text.format(logs[name]) for name, text in SHOWN.items() if name in logs]
            tqdm.write(f"step {state.global_step}/{state.max_steps}: {', '.join(shown)}", file=self.trainer.stdout)


class TensorBoardLog(TensorBoardCallback):
    """Ends where the disk takes no more of it: a log is not worth the run."""

    is_lost = False

    def __init__(self, *args):
        super().__init__(*args)
        show = threading.excepthook

        def show_others(told) -> None:  # the writer's thread raises what it has told as well
            is_writer = type(told.thread).__module__.startswith("tensorboard.")
            if not (is_writer and isinstance(told.exc_value, OSError)):
                show(told)

        threading.excepthook = show_others

    def on_train_begin(self, *args, **kwargs) -> None:
        self._try(super().on_train_begin, *args, **kwargs)

    def on_log(self, *args, **kwargs) -> None:
        self._try(super().on_log, *args, **kwargs)

    def on_train_end(self, *args, **kwargs) -> None:
        self._try(super().on_train_end, *args, **kwargs)

    def _try(self, write: Callable[..., None], *args, **kwargs) -> None:
        try:
            if not self.is_lost:
                write(*args, **kwargs)
        except OSError as error:
            self.is_lost = True
            reason = os.strerror(error.errno) if error.errno else error
            logger.warning(f"--report_to tensorboard: its log ends here: {reason}; trainer_state.json has all of it")


def show_steps(trainer: Trainer) -> None:
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(ProgressBar)
    trainer.add_callback(StepLines(trainer))
    if trainer.pop_callback(TensorBoardCallback) is not None:
        trainer.add_callback(TensorBoardLog)


def save_results(trainer: Trainer, name: str, metrics: dict[str, float]) -> None:
    """Writes `{name}_results.json` and adds to `all_results.json` (rank 0)."""
    trainer.log_metrics(name, metrics)
    if trainer.is_world_process_zero():
        folder, results = Path(trainer.args.output_dir), {**metrics, "version": __version__}
        _write_json(folder / f"{name}_results.json", results)
        everything = folder / "all_results.json"
        _write_json(everything, {**read_results(everything), **results})


def _write_json(path: Path, content: Mapping) -> None:
    write_file(path, json.dumps(content, indent=4, sort_keys=True) + "\n")


def read_results(path: Path) -> dict:
    """What earlier parts of the run wrote. A damaged file is set aside: the run that reads it has ended well."""
    try:
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return content
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        pass
    aside = path.with_name(f"damaged-{path.name}")
    os.replace(path, aside)
    logger.warning(f"{path} is damaged: a new one is begun, the old one is kept as {aside}")
    return {}


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
