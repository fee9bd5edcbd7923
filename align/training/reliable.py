"""What lets a run survive and its result be trusted: checkpoints, resuming, signals, steps that are not finite."""

import contextlib
import json
import logging
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import xxhash
from optimum.habana import GaudiTrainer
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from align.data.preparing import Prepared
from align.errors import InputError, ResultError, Stopped
from align.training import checkpoints, report
from align.training.checkpoints import STATE, UNFINISHED, Run, RunArguments, noting_disk_errors
from align.training.gate import MOVED, Gate, Movement
from align.training.optimizers import WITHOUT_WARMUP
from align.training.ranks import all_ranks, first_of_all_ranks
from align.training.results import show_steps
from align.training.samples import Samples, find_prompts
from align.training.uploading import UploadingMixin
from align.upstream_fixes import check_deepspeed_steps, inspect_deepspeed_files, load_deepspeed_safely
from align.whole import flush, remove

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# The first is a pickle that nobody reads; PEFT's model card is an empty form.
UNWANTED = ("training_args.bin", report.CARD)
LOOKED_EVERY = 10  # batches of an evaluation on several ranks, which must agree on a signal


def heed_parent_alone(init: Callable[[int], None] | None, worker: int) -> None:
    """Begins a worker that loads rows: SIGTERM ends it if its trainer sends it, and not if Slurm does to all processes.

    torch ends it for both, and with it the trainer, which then saves nothing (_utils/signal_handling.py:73).
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
    if init is not None:
        init(worker)


class Interrupted(Exception):
    """All ranks have agreed that a signal ends what they compute between two steps."""


@dataclass
class Pending:
    """A checkpoint that all ranks have written and the disk still takes, while they take the steps that follow."""

    folder: Path
    final: Path
    best: str | None  # the best checkpoint before
    committed: Future[str | None]  # why the disk did not take it; of the ranks that save nothing: None at once


class ReliableMixin(UploadingMixin):
    """Stands first among a trainer's classes. Begin with `watch`."""

    stdout: TextIO | None = None  # the script's own, while libraries print to standard error
    run: Any = None  # a `Run`; the steps of tests and benchmarks belong to none
    signal = 0  # the one that this rank got
    stopped_by = 0  # the one that all ranks agree on
    looks = 0  # between batches without a step
    nonfinite_steps = 0
    is_left_out = False  # the step that ends
    left_out = 0  # steps since the last log
    problem: str | None = None  # for which this rank cannot take the step, and no other may
    resumed: Any = None  # the manifest, a dict
    pending: Pending | None = None

    @property
    def longest(self) -> int:
        """Tokens that a sample has at most."""
        raise NotImplementedError

    def watch(self, run: Run, run_args: RunArguments, prepared: Mapping[str, Prepared]) -> None:
        self.run, self.run_args, self.prepared = run, run_args, prepared
        prompts = []
        if run_args.sample_prompts:
            prompts = find_prompts(prepared["validation"].rows, run_args.sample_prompts, self.longest)
        self.samples = Samples(self, prompts, self.longest)
        self.gate = Gate(self.model)
        self.movement: Any = None  # a `Movement`, from the start of training on
        self.saved_at = time.monotonic()
        self.saved_step: int | None = None
        self.beside = ThreadPoolExecutor(1)
        self.losses: list[torch.Tensor] = []  # of the step's micro-batches
        self.step_batches: list[Mapping] = []
        self.grad_norm: torch.Tensor | None = None
        self.hashes_order = self.hash_order()
        self.add_callback(_AfterEachStep(self))
        self.add_callback(self.samples)
        show_steps(self)

    # Training

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        folder = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self.resumed_from: Any = folder
        self.resumed = checkpoints.read_manifest(folder) if folder else None
        if self.resumed and self.resumed["order"] != self.hashes_order:
            raise InputError(
                f"{folder} was made with rows in another order (other data, --num_buckets, batch size or number of "
                "ranks; of pairs that are streamed --max_steps); give what it was made with, or another --output_dir"
            )
        if self.is_deepspeed_enabled:
            load_deepspeed_safely()
            self._inspect(folder)
        try:
            with self.heed_signals(), self.own_stdout(), self._finishing(), contextlib.suppress(Interrupted):
                output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except pickle.UnpicklingError as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{folder} holds more than tensors and is not loaded: {reason}") from error
        if self.stopped_by:
            last, saved = self._last_checkpoint(), "nothing is saved"
            if last:
                saved = f"{last} is saved, and the same command with --resume auto goes on from there"
            name = signal.Signals(self.stopped_by).name
            raise Stopped(f"{name}: stopped after step {self.state.global_step}; {saved}", self.stopped_by)
        if self.nonfinite_steps and self.nonfinite_steps == self.state.global_step:
            raise ResultError("no step was taken: the loss or gradient of each was not finite, so nothing was learnt")
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is None:
            logger.warning(
                "--load_best_model_at_end: no checkpoint has a value of --metric_for_best_model; the last weights stay"
            )
        self._correct_speed(output.metrics)
        return output

    def _last_checkpoint(self) -> Path | None:
        if self.saved_step is not None:
            return Path(self.args.output_dir, f"checkpoint-{self.saved_step}")
        return self.resumed_from

    def _inspect(self, folder: Path | None) -> None:
        """Inspects DeepSpeed's files before any rank loads: one that refused its own would leave the others waiting."""
        problem = None
        if folder and self.args.local_process_index == 0:
            try:
                inspect_deepspeed_files(folder)
            except InputError as error:
                problem = error
        if problem := first_of_all_ranks(problem):
            raise problem

    def _correct_speed(self, metrics: dict[str, float]) -> None:
        """Corrects optimum-habana 1.21.2, which divides the samples of all steps by the time since the resume."""
        if self.resumed:
            share = (self.state.global_step - self.resumed["step"]) / max(1, self.state.max_steps)
            for name in ("train_samples_per_second", "train_steps_per_second", "train_tokens_per_second"):
                if name in metrics:
                    metrics[name] = round(metrics[name] * share, 3)

    def _inner_training_loop(self, batch_size=None, **kwargs):
        """Takes the batch size of the command line, where a resume would take that of the checkpoint."""
        return super()._inner_training_loop(batch_size=self.args.train_batch_size, **kwargs)

    def set_initial_training_values(self, *args, **kwargs):
        """Leaves no epoch where the checkpoint has all steps: the loop would take one more."""
        epochs, *others, max_steps = super().set_initial_training_values(*args, **kwargs)
        finished = self.resumed is not None and self.resumed["step"] >= max_steps
        if finished and self.resumed["step"] > max_steps:
            logger.warning(
                f"{self.resumed_from} has taken {self.resumed['step']} steps, more than the {max_steps} asked for: "
                "its weights are saved as they are"
            )
        elif finished:
            logger.info(f"all {max_steps} steps were taken before; nothing is left to train")
        return (0 if finished else epochs, *others, max_steps)

    def _get_dataloader(self, *args, **kwargs):
        loader = super()._get_dataloader(*args, **kwargs)
        makes_workers = getattr(loader, "base_dataloader", loader)  # accelerate's stands around it
        makes_workers.worker_init_fn = partial(heed_parent_alone, makes_workers.worker_init_fn)
        return loader

    def hash_order(self) -> str | None:
        """A hash of what each step of the first epoch trains on; None for a stream, whose rows are not known before."""
        sampler = self._get_train_sampler() if self.train_dataset is not None else None
        if sampler is None:
            return None
        digest = xxhash.xxh3_128(np.fromiter(sampler, np.int64).tobytes())
        rows = getattr(self.train_dataset, "rows", None)
        for part in ("members", "starts"):
            digest.update(np.ascontiguousarray(getattr(rows, part, ())).tobytes())
        return digest.hexdigest()

    def evaluate(self, *args, **kwargs):
        """Raises a ResultError where the loss is not finite, unless training goes on, which may yet mend it."""
        with self.own_stdout():
            metrics = super().evaluate(*args, **kwargs)
        loss = metrics.get("eval_loss", 0.0)
        if not np.isfinite(loss):
            line = f"the evaluation loss after step {self.state.global_step} is {loss}"
            if not self.is_in_train:
                raise ResultError(f"{line}: the model gives values that are not finite for rows that were held out")
            logger.warning(line)
        return metrics

    @contextlib.contextmanager
    def own_stdout(self) -> Iterator[None]:
        """Sends what libraries print to standard error (DeepSpeed prints a lot); ours goes to `stdout`."""
        if self.stdout is not None:
            yield
            return
        self.stdout = sys.stdout
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        finally:
            self.stdout = None

    # Steps

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.run is not None:
            self.step_batches.append(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def _agree(self, gradients_are_finite: bool | None = None) -> bool:
        """Lets all ranks decide about a step before it is taken. Returns whether it may be taken."""
        losses = torch.stack([loss.float().reshape(()) for loss in self.losses]).tolist()
        finite = self._are_finite(losses, gradients_are_finite)
        due = self.run_args.save_seconds and time.monotonic() - self.saved_at >= self.run_args.save_seconds
        votes = [not finite, self.signal, bool(due) and self.is_world_process_zero(), self.problem is not None]
        bad, stopped_by, due, wrong = self._highest(votes)
        if wrong:
            raise ResultError(first_of_all_ranks(self.problem))
        self.stopped_by = self.stopped_by or stopped_by
        self.save_is_due = bool(due or self.stopped_by)
        if bad:
            self._skip_step(losses)
        else:
            self.movement.rates += self._get_learning_rate()
        self.losses, self.step_batches = [], []
        return not bad

    def _highest(self, votes: list) -> list[int]:
        """The highest of each vote among all ranks."""
        if self.args.world_size == 1:
            return [int(vote) for vote in votes]
        highest = torch.tensor([int(vote) for vote in votes], dtype=torch.int32, device=self.args.device)
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
        return highest.tolist()

    def _are_finite(self, losses: list[float], gradients_are_finite: bool | None) -> bool:
        if gradients_are_finite is None:
            gradients_are_finite = self._has_finite_gradients()
        return gradients_are_finite and bool(np.isfinite(losses).all())

    def _has_finite_gradients(self) -> bool:
        norm, self.grad_norm = self.grad_norm, None
        if norm is None:  # --max_grad_norm 0
            gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
            norm = torch.stack([each.float().norm() for each in gradients]).sum() if gradients else torch.zeros(())
        return bool(torch.as_tensor(norm).isfinite().all())

    def _skip_step(self, losses: list[float]) -> None:
        self.nonfinite_steps += 1
        self.is_left_out = True
        step, limit = self.state.global_step + 1, self.run_args.max_nonfinite_steps
        suspects = [not np.isfinite(loss) for loss in losses]
        rows = [
            {"step": step, "rank": self.args.process_index, "loss": str(loss), **row}
            for batch, loss, suspect in zip(self.step_batches, losses, suspects, strict=True)
            for row in (self.describe_rows(batch) if suspect or not any(suspects) else ())
        ]
        where = [bool(any(suspects)) for suspects in all_ranks(suspects)]
        told = [row for rank, part in enumerate(all_ranks(rows)) if where[rank] or not any(where) for row in part]
        path = Path(self.args.output_dir, "bad_batch.jsonl")
        if self.is_world_process_zero():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in told)
        names = ", ".join(dict.fromkeys(str(row.get("row", "?")) for row in told))
        names = names if len(names) < 200 else f"{names[:200]}..."
        what = "a loss" if any(where) else "the gradient"
        line = f"step {step}: {what} is not finite; the step is not taken. Its rows ({names}) are in {path}"
        if self.nonfinite_steps >= limit:
            raise ResultError(f"{line}. This was number {self.nonfinite_steps} of --max_nonfinite_steps {limit}")
        logger.warning(line)

    def describe_rows(self, batch: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
        """What a batch was made of: each `row` (its place in the training rows), its `text` and `input_ids`."""
        raise NotImplementedError

    # Signals

    @contextlib.contextmanager
    def heed_signals(self) -> Iterator[None]:
        """A signal waits for the end of the step; a second SIGINT for the disk alone, a third one for nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}

        def note(number: int, _) -> None:
            if number == signal.SIGINT and self.signal == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                if self.pending is not None:
                    self.pending.committed.result()
                os.kill(os.getpid(), signal.SIGINT)
            self.signal = self.signal or number

        try:
            for number in SIGNALS:
                if before[number] != signal.SIG_IGN:  # nohup's doing, or the caller's
                    signal.signal(number, note)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def give_way(self) -> None:
        """Between two batches without a step, of an evaluation within training: a signal does not wait for its end.

        All ranks call it as often.
        """
        self.looks += 1
        if self.args.world_size == 1 or self.looks % LOOKED_EVERY == 0:
            self.stopped_by = self._highest([self.signal])[0]
            if self.stopped_by:
                raise Interrupted

    # Saving

    def _state_to_save(self) -> dict[str, torch.Tensor]:
        """The trained tensors of an adapter, else the whole model, on the CPU of the rank that saves.

        All ranks must call it. optimum-habana 1.21.2 gathers the frozen base as well (transformers/trainer.py:1808),
        under ZeRO-3 on the host of rank 0: 140 GB for a 70B.
        """
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PeftModel) and is_deepspeed_zero3_enabled():
            return self.deepspeed._zero3_consolidated_16bit_state_dict() or {}
        tensors = model.state_dict(keep_vars=True) if not isinstance(model, PeftModel) else self._adapter_state(model)
        gathered = contextlib.nullcontext()
        if is_deepspeed_zero3_enabled():
            import deepspeed

            gathered = deepspeed.zero.GatheredParameters(list(tensors.values()))
        with gathered, torch.no_grad():
            copies: dict[int, torch.Tensor] = {}  # tied tensors stay so
            for tensor in tensors.values() if self.args.should_save else ():
                copies.setdefault(id(tensor), tensor.detach().to("cpu", copy=is_deepspeed_zero3_enabled()))
            return {name: copies[id(tensor)] for name, tensor in tensors.items() if id(tensor) in copies}

    @staticmethod
    def _adapter_state(model: PeftModel) -> dict[str, torch.nn.Parameter]:
        weights = dict(model.named_parameters())
        state = {name: weight for name, weight in weights.items() if weight.requires_grad}
        if any("lora_embedding" in name for name in state):  # PEFT then saves the embedding itself too
            for module in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
                held = {id(weight) for weight in module.parameters()}
                state |= {name: weight for name, weight in weights.items() if id(weight) in held}
        return state

    def _write_model(self, folder: Path) -> str | None:
        """Writes model or adapter and looks at it; returns what is wrong. All ranks must call it."""
        changed = self._highest([self.movement.count_changed()])[0] if self.movement else None
        state = self._state_to_save()
        if not self.args.should_save:
            return None
        if changed == 0 and self.movement.rates > MOVED:
            return f"no weight has changed since the run began, at a learning rate of {self.args.learning_rate:g}"
        try:
            self._save(str(folder), state_dict=state)
            for name in UNWANTED:
                (folder / name).unlink(missing_ok=True)
            self.passed = self.gate.check(folder, state)
            if changed is not None:
                self.passed |= {"changed": changed, "trained": len(self.movement.weights)}
        except ResultError as error:
            return str(error).replace(UNFINISHED, "")
        return None

    def _save_checkpoint(self, model, trial=None) -> None:
        """Writes it whole or not at all (`align/training/checkpoints.py`). A full disk costs it, and not the run."""
        self._finish_checkpoint()
        step = self.state.global_step
        if self.saved_step == step or (self.resumed and self.resumed["step"] == step):
            return
        self.store_flos()
        final = Path(self.args.output_dir, f"checkpoint-{step}")
        folder = final.with_name(UNFINISHED + final.name)
        best, problem, errors = self.state.best_model_checkpoint, None, []
        with noting_disk_errors(errors):
            self._begin(folder)
        self.accelerator.wait_for_everyone()
        with noting_disk_errors(errors):
            problem = self._write_model(folder)
        if not self.args.save_only_model:
            self._write_optimizer(folder, errors)
        with noting_disk_errors(errors):
            self.save_more(folder)
        progress = self.progress()
        self._note_best(final)
        if self.args.should_save:
            self._note_callbacks()
            with noting_disk_errors(errors):
                self.state.save_to_json(str(folder / STATE))
        self.accelerator.wait_for_everyone()
        error, problem = first_of_all_ranks(next(iter(errors), None)), first_of_all_ranks(problem)
        self.saved_at = time.monotonic()
        if error:
            self._lose(folder, final, best, error)
            return
        if problem:
            self._reject(folder, final, problem)
        committed = self.beside.submit(self._commit, folder, final, self._about(progress))
        self.pending = Pending(folder, final, best, committed)
        if self.args.push_to_hub or any(map(_looks_at_checkpoints, self.callback_handler.callbacks)):
            self._finish_checkpoint()

    def _commit(self, folder: Path, final: Path, about: Mapping) -> str | None:
        """Makes the folder the checkpoint `final`; returns why the disk did not let it."""
        errors: list[str] = []
        if self.args.should_save:
            with noting_disk_errors(errors):
                checkpoints.commit(folder, final, about)
        return next(iter(errors), None)

    def _finish_checkpoint(self) -> None:
        """Waits until the last checkpoint has its name. All ranks call it."""
        if self.pending is not None:
            self._end_checkpoint(self.pending, first_of_all_ranks(self.pending.committed.result()))

    def _end_checkpoint(self, written: Pending, error: str | None) -> None:
        self.pending = None
        if error:
            self._lose(written.folder, written.final, written.best, error)
            return
        self.saved_step = checkpoints.step_of(written.final)
        if self.args.should_save:
            self._remove_old(self.saved_step)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(written.final))

    @contextlib.contextmanager
    def _finishing(self) -> Iterator[None]:
        """No checkpoint is left without its name, however the block ends: where this rank fails it asks no other."""
        try:
            yield
        except BaseException:
            if self.pending is not None:
                self._end_checkpoint(self.pending, self.pending.committed.result())
            raise
        self._finish_checkpoint()

    def _lose(self, folder: Path, final: Path, best: str | None, error: str) -> None:
        self.state.best_model_checkpoint = best
        self._clear(folder)
        logger.error(f"{final} is not saved: {error}; earlier ones stay as they are, and the run goes on")

    def _begin(self, folder: Path) -> None:
        if self.args.should_save:
            self._clear(folder)
            folder.mkdir(parents=True)

    def _clear(self, folder: Path) -> None:
        if self.args.should_save and folder.is_dir():
            with contextlib.suppress(OSError):
                remove(folder)

    def _write_optimizer(self, folder: Path, errors: list[str]) -> None:
        before = len(errors)
        with noting_disk_errors(errors):
            self._save_optimizer_and_scheduler(str(folder))
        if self.is_deepspeed_enabled and self.args.world_size > 1 and len(errors) > before:
            # The other ranks wait in the middle of DeepSpeed's save and cannot be called back.
            raise ResultError(
                f"checkpoint-{self.state.global_step} is not saved into {self.args.output_dir}: {errors[0]}; "
                "make room, then add --resume auto"
            )
        with noting_disk_errors(errors):
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))

    def _sorted_checkpoints(self, *args, **kwargs) -> list[str]:
        """What --save_total_limit counts and removes first: none of later steps, which are torn or of before a resume.

        None where optimum-habana 1.21.2 asks at the end of training, to remove the last one for the best one's sake if
        the limit is 1 (transformers/trainer.py:1212): a run that was stopped goes on from it.
        """
        if self.removes_up_to is None:
            return []
        found = reversed(checkpoints.list_checkpoints(Path(self.args.output_dir)))
        kept = [str(path) for path in found if checkpoints.step_of(path) <= self.removes_up_to]
        if (best := self.state.best_model_checkpoint) in kept[:-1]:
            kept.remove(best)
            kept.insert(-1, best)
        return kept

    def _load_best_model(self) -> None:
        self._finish_checkpoint()
        if self.state.best_model_checkpoint is None or self.stopped_by:
            return  # the disk did not take it; or the grace period may be short, and nothing is saved from here
        best = Path(self.state.best_model_checkpoint)
        if damage := checkpoints.shared_damage(best, self.args.process_index, self.args.world_size):
            raise ResultError(
                f"--load_best_model_at_end: {best} cannot be loaded ({damage}); leave the flag out and add --resume "
                "auto to save the last weights"
            )
        super()._load_best_model()

    def _determine_best_metric(self, metrics, trial) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best:  # also under --save_strategy best, of which transformers 4.55.4 never loads the best one at the end
            self.state.best_global_step = self.state.global_step
        return is_best

    def _remove_old(self, step: int) -> None:
        errors: list[str] = []
        self.removes_up_to = step
        with noting_disk_errors(errors):
            self._rotate_checkpoints(use_mtime=False, output_dir=self.args.output_dir)
        self.removes_up_to = None
        if errors:
            logger.warning(f"--save_total_limit: an older checkpoint cannot be removed: {errors[0]}")

    def _about(self, progress: Mapping) -> dict[str, Any]:
        return {
            "step": self.state.global_step,
            "world_size": self.args.world_size,
            "resumable": not self.args.save_only_model,
            "software": checkpoints.software(),
            "facts": self.run.facts,
            "order": self.hashes_order,
            "gate": self.passed,
            "progress": progress,
            "flags": self.run.flags,
            "settings": self.run.settings,
        }

    def _reject(self, folder: Path, final: Path, problem: str) -> None:
        kept = final.with_name(f"failed-{final.name}")
        if self.args.should_save:
            shutil.rmtree(kept, ignore_errors=True)
            os.rename(folder, kept)
        raise ResultError(f"{problem}; kept as {kept}")

    def _note_best(self, final: Path) -> None:
        """On all ranks: each of them loads it at the end."""
        best = final.with_name(f"checkpoint-{self.state.best_global_step}")
        if all_ranks(best == final or best.is_dir())[0]:
            self.state.best_model_checkpoint = str(best)

    def _note_callbacks(self) -> None:
        for callback in (*self.callback_handler.callbacks, self.control):
            if hasattr(callback, "state"):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the final model beside its place, checks it, then moves it in. A signal waits until it is there."""
        output = Path(output_dir or self.args.output_dir)
        with self.heed_signals():
            self._save_final(output)
        if stopped_by := self._highest([self.signal])[0]:
            rest = "; the same command with --resume auto does the rest" if self._last_checkpoint() else ""
            name = signal.Signals(stopped_by).name
            raise Stopped(f"{name}: stopped; the model is saved in {output}{rest}", stopped_by)

    def _save_final(self, output: Path) -> None:
        """The weights come last."""
        problem, errors = None, []
        folder = output / f"{UNFINISHED}final"
        with noting_disk_errors(errors):
            self._begin(folder)
        self.accelerator.wait_for_everyone()
        with noting_disk_errors(errors):
            problem = self._write_model(folder)
        if self.args.should_save and not problem and not errors:
            with noting_disk_errors(errors):
                self._move_in(folder, output)
        error, problem = first_of_all_ranks(next(iter(errors), None)), first_of_all_ranks(problem)
        if error:
            self._clear(folder)
            raise ResultError(
                f"the model is not saved into {output}: {error}; make room, then add --resume auto to go on from "
                "the last checkpoint"
            )
        if problem:
            self._reject(folder, output / "final", problem)

    def _move_in(self, folder: Path, output: Path) -> None:
        files = checkpoints.seal(folder)
        for name in sorted(files, key=lambda name: name.endswith((".safetensors", ".bin"))):
            (output / name).parent.mkdir(exist_ok=True)  # of a tokenizer's additional chat templates
            os.replace(folder / name, output / name)
            flush((output / name).parent)
        checkpoints.write_manifest(output, files, self._about({"total_loss": self._total_loss_scalar}))
        flush(output)
        shutil.rmtree(folder)

    def save_more(self, folder: Path) -> None:
        """Writes what else a trainer keeps in a checkpoint. All ranks call it."""

    def load_more(self, folder: Path) -> None:
        """Its counterpart."""

    # Going on

    def progress(self) -> dict[str, Any]:
        """What the trainer has added up beside its state. All ranks call it."""
        unlogged = self._nested_gather(self.unlogged).mean().item() if self.unlogged is not None else 0.0
        return {
            "total_loss": self._total_loss_scalar,
            "unlogged_loss": unlogged,
            "last_logged_step": self._globalstep_last_logged,
            "nonfinite_steps": self.nonfinite_steps,
            "left_out": self.left_out,
            "answers": dict(self.samples.answers),
        }

    unlogged: torch.Tensor | None = None
    carried_loss = 0.0  # that was not logged before the checkpoint
    save_is_due = False
    removes_up_to: int | None = None  # a step, while older checkpoints are removed
    passed: dict | None = None

    def find_best_again(self) -> None:
        """The best checkpoint so far stands beside the one that is resumed, also where the folder was moved."""
        if self.state.best_model_checkpoint is None:
            return
        best = self.resumed_from.with_name(Path(self.state.best_model_checkpoint).name)
        lost = "is gone" if first_of_all_ranks(not best.is_dir()) else self.run.find_other_choice(self.resumed)
        if lost:
            logger.warning(f"{best}, the best checkpoint so far, {lost}: the best of those to come counts")
            self.state.best_model_checkpoint = self.state.best_metric = self.state.best_global_step = None
        else:
            self.state.best_model_checkpoint = str(best)

    def restore_progress(self, progress: Mapping[str, Any]) -> None:
        self._total_loss_scalar = progress["total_loss"]
        self._globalstep_last_logged = progress["last_logged_step"]
        self.nonfinite_steps = progress["nonfinite_steps"]
        self.left_out = progress.get("left_out", 0)  # the release before had none
        self.samples.answers = dict(progress.get("answers", {}))
        if self.resumed["step"] >= self.state.max_steps:
            self._total_loss_scalar += progress["unlogged_loss"]
        else:
            self.carried_loss = progress["unlogged_loss"]

    def _maybe_log_save_evaluate(self, tr_loss, *args, **kwargs):
        if self.is_left_out:  # its loss would be that of all later steps too
            if self.unlogged is None:
                tr_loss.zero_()
            else:
                tr_loss.copy_(self.unlogged)
            self.forget_step()
            self.left_out += 1
        tr_loss += self.carried_loss
        self.carried_loss, self.unlogged = 0.0, tr_loss
        self.logged = self._globalstep_last_logged, self._total_loss_scalar
        try:
            super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)
        except Interrupted:
            name, step = signal.Signals(self.stopped_by).name, self.state.global_step
            logger.warning(f"{name}: the evaluation after step {step} was not finished, and is not in the log")
            self._save_checkpoint(self.model)
            self.control.should_training_stop, self.control.should_evaluate = True, False
        self.is_left_out = False
        if self.control.should_training_stop:  # optimum-habana 1.21.2 adds what is left on the first rank alone
            tr_loss.copy_(self._nested_gather(tr_loss).mean())  # (transformers/trainer.py:1184)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs the whole loss, a mean over the steps that were taken.

        optimum-habana 1.21.2 leaves four digits, and divides by all steps (transformers/trainer.py:1350, :1186).
        """
        if "loss" in logs:
            step, total = self.logged
            taken, self.left_out = self.state.global_step - step - self.left_out, 0
            logs["loss"] = (self._total_loss_scalar - total) / max(1, taken)
            if taken == 0:
                del logs["loss"]
            if self.is_left_out:  # DeepSpeed's norm would be that of the step before
                logs.pop("grad_norm", None)
        if "train_loss" in logs:
            steps = self.state.global_step
            logs["train_loss"] *= steps / max(1, steps - self.nonfinite_steps)
        GaudiTrainer.log(self, logs, start_time)

    def forget_step(self) -> None:
        """Takes a step that was left out from what the trainer adds up beside its loss."""

    def create_optimizer(self) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer()
        if is_new:
            kept = ("params", "step")
            groups = optimizer.param_groups
            self.wanted_groups = [{name: group[name] for name in group if name not in kept} for group in groups]
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Takes the optimizer's moments from the checkpoint, the learning rate and the rest from the flags."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not isinstance(self.lr_scheduler, LambdaLR):
            return
        groups = self.optimizer.param_groups
        scheduler = self.lr_scheduler
        scheduler.base_lrs = [wanted["lr"] for wanted in self.wanted_groups]
        rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        scheduler._last_lr = [rate * factor(scheduler.last_epoch) for rate, factor in rates]
        for group, wanted, rate in zip(groups, self.wanted_groups, scheduler._last_lr, strict=True):
            group.update({**wanted, "initial_lr": wanted["lr"], "lr": rate})


def _looks_at_checkpoints(callback: TrainerCallback) -> bool:
    """Such as loggers that upload them."""
    return getattr(callback.on_save, "__func__", None) is not TrainerCallback.on_save


class _AfterEachStep(TrainerCallback):
    """Acts where the trainer's loop calls back."""

    def __init__(self, trainer: ReliableMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        trainer = self.trainer
        trainer.movement = Movement(trainer.model)
        trainer.saved_at = time.monotonic()
        rises = args.get_warmup_steps(state.max_steps) if args.lr_scheduler_type.value not in WITHOUT_WARMUP else 0
        if rises >= state.max_steps:
            logger.warning(
                f"the learning rate rises for {rises} steps (--warmup_steps) and the run has {state.max_steps}: it "
                "never comes to --learning_rate"
            )
        if trainer.resumed:
            state.compute_steps(args, state.max_steps)  # else the checkpoint's intervals would count, not the flags'
            trainer.find_best_again()
            trainer.restore_progress(trainer.resumed["progress"])
            trainer.load_more(trainer.resumed_from)
        if trainer.is_deepspeed_enabled:
            check_deepspeed_steps(trainer.accelerator, trainer._agree)
        else:
            self._record_norm()
        self._record_losses()

    def _record_losses(self) -> None:
        trainer = self.trainer
        backward = trainer.accelerator.backward

        def record(loss, **kwargs):
            trainer.losses.append(loss.detach())
            backward(loss, **kwargs)

        trainer.accelerator.backward = record

    def _record_norm(self) -> None:
        """Keeps the norm that the clipping computes, whichever of the two clips."""
        trainer = self.trainer
        clipper, name = trainer.accelerator, "clip_grad_norm_"
        if trainer.FusedNorm is not None:
            clipper, name = trainer.FusedNorm, "clip_norm"
        clip = getattr(clipper, name)

        def record(*args, **kwargs):
            trainer.grad_norm = clip(*args, **kwargs)
            return trainer.grad_norm

        setattr(clipper, name, record)

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        if self.trainer.is_in_train:
            self.trainer.give_way()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        trainer = self.trainer
        if not trainer.is_deepspeed_enabled and not trainer._agree():
            trainer.accelerator.gradient_state._set_sync_gradients(False)  # accelerate then leaves the step out

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.save_is_due:
            control.should_save, self.trainer.save_is_due = True, False
        if self.trainer.stopped_by:
            control.should_training_stop, control.should_evaluate = True, False
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.trainer.stopped_by:
            control.should_evaluate = False
        return control
