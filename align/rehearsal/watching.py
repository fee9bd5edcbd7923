"""Watches a script's own main() run: what lives on the card in each phase, shapes, graphs, host reads, files.

On a dry card it is a rehearsal. On the emulator's ordinary card, and on a Gaudi, the same watcher measures a real run.
"""

import functools
import importlib
import importlib.util
import itertools
import json
import logging
import os
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from align.data.chats import NOT_SHOWN
from align.data.packing import read_numbers
from align.errors import InputError
from align.models import guard
from align.rehearsal import models
from align.rehearsal.ledger import Ledger

LOOKED_AT = 256  # micro-batches whose shapes are looked at before the first step
GENERATED = 8  # forward passes of a generation
EVALUATED = 2  # batches of an evaluation, the largest first


def watch(plan: dict, seen: dict) -> None:
    """Runs the script of `plan` and fills `seen`.

    The plan: `script`, `arguments`, `steps` (at least that many, and more within `seconds`, up to `most_steps`),
    `probe` (what it would find on real values), `own_kernels` (the emulator's, not a card's), `whole_logits`.
    """
    from habana_frameworks.emulator import dry, dry_kernels, dry_loading
    from habana_frameworks.emulator.graph_counter import count_graphs

    ledger, files, reads = Ledger(), {}, Counter()
    with ExitStack() as stack:
        put_aside(stack)
        logging.setLogRecordFactory(functools.partial(_keep_what_is_said, logging.getLogRecordFactory(), seen))
        arguments = models.fill_in(plan["arguments"], Path(plan["models"])) if dry.is_wanted else plan["arguments"]
        sys.argv = [plan["script"], *arguments]
        sys.path.insert(0, str(Path(plan["script"]).resolve().parent))
        graphs = stack.enter_context(count_graphs())
        stack.enter_context(ledger.counting())
        watcher = Watcher(plan, seen, ledger, graphs, stack)
        if dry.is_wanted:
            stack.callback(setattr, guard, "check_values", guard.check_values)
            guard.check_values = lambda *_: None  # no weight is read
            if plan.get("own_kernels"):
                dry_kernels.uninstall()
            for hooks, hook in (
                (dry_loading.on_save, lambda path, size: files.__setitem__(str(Path(path).resolve()), size)),
                (dry_loading.on_load, watcher.loads),
                (dry.on_host_read, lambda read: reads.update([read]) if watcher.in_step else None),
            ):
                hooks.append(hook)
                stack.callback(hooks.remove, hook)
            dry.not_the_host.append("/align/rehearsal/")
        try:
            script = importlib.import_module(Path(plan["script"]).stem)
            watcher.install()
            script.main()
            seen["ended"] = True
        except Enough:
            seen["ended"] = True
        except InputError as error:
            seen["error"] = {"kind": "input", "text": str(error)}
        except MemoryError:
            seen["error"] = {"kind": "memory", "text": "the rehearsal itself ran out of the memory that it may take"}
        except SystemExit as error:
            seen["error"] = {"kind": "exit", "text": f"{Path(plan['script']).name} ended with {error.code}"}
        except Exception as error:  # the run's own failure: its last line goes into the report, the rest into the log
            traceback.print_exc()
            text = " ".join(str(error).split())
            seen["error"] = {"kind": "crash", "text": f"{type(error).__name__}: {text}"[:600]}
    seen["peaks"] = {
        phase: {"total": peak.total, "by_kind": shown(peak.by_kind), "by_module": shown(peak.by_module)}
        for phase, peak in ledger.peaks.items()
    }
    seen["host_peak"] = ledger.host_peak
    seen["files"] = files
    seen["host_reads"] = [
        {"file": read.file, "line": read.line, "function": read.function, "times": times}
        for read, times in reads.most_common(20)
    ]


def put_aside(stack: ExitStack) -> None:
    """Removes at the end what the next run would find of this one."""
    stack.callback(logging.setLogRecordFactory, logging.getLogRecordFactory())
    environment = dict(os.environ)
    stack.callback(os.environ.update, environment)
    stack.callback(os.environ.clear)  # first: ACCELERATE_USE_DEEPSPEED would start DeepSpeed in the next one
    stack.callback(_forget_run)


def _forget_run() -> None:
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state()
    if "transformers.integrations.deepspeed" in sys.modules:
        sys.modules["transformers.integrations.deepspeed"].unset_hf_deepspeed_config()


def _keep_what_is_said(make: Callable, seen: dict, *args, **kwargs) -> logging.LogRecord:
    """Puts what the scripts log and warn of into the report too."""
    record = make(*args, **kwargs)
    if record.name.startswith("align"):
        text = record.getMessage()
        if record.levelno >= logging.WARNING and NOT_SHOWN not in text:  # which `report_data` makes a reason of
            seen.setdefault("warnings", []).append(text)
        if match := re.match(r"(\w+): (?:[\d,]+ computed tokens a pair, )?([\d.]+)% of (?:the computed|them)", text):
            seen.setdefault("useful", {})[match[1]] = float(match[2]) / 100
    return record


def shown(sizes: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in sorted(sizes.items(), key=lambda item: -item[1]) if size > 0}


class Enough(Exception):
    """All that there is to see was seen."""


class Watcher:
    """Puts itself around the methods of the trainers, of DeepSpeed and of the scripts' own modules."""

    def __init__(self, plan: dict, seen: dict, ledger: Ledger, graphs, stack: ExitStack):
        self.stack = stack  # puts back at its end what was replaced
        self.plan, self.seen, self.ledger, self.graphs = plan, seen, ledger, graphs
        self.in_training = False
        self.micro_batches: list[dict] = []
        seen.update(steps=[], loaded=[], data={}, ended=False)

    @property
    def in_step(self) -> bool:
        return self.in_training and self.ledger.current_phase in ("forward", "backward", "optimizer")

    # Where it stands

    def install(self) -> None:
        import accelerate
        from optimum.habana import GaudiTrainer
        from optimum.habana.accelerate import GaudiAccelerator

        from align.data import preparing
        from align.models import attention, head
        from align.training import preference, supervised
        from align.training.reliable import ReliableMixin
        from align.training.samples import Samples
        from habana_frameworks.emulator import dry

        self.around(GaudiTrainer, "training_step", self.training_step)
        self.around(GaudiTrainer, "train", self.train)
        self.around(GaudiTrainer, "get_train_dataloader", self.train_batches)
        self.around(GaudiTrainer, "get_eval_dataloader", self.eval_batches)
        self.around(preparing, "report", self.report_data)
        for owner, name, phase in (
            (GaudiTrainer, "evaluation_loop", "evaluation"),
            (ReliableMixin, "save_model", "saving"),
            (ReliableMixin, "_save_checkpoint", "saving"),
            (GaudiAccelerator, "backward", "backward"),
        ):
            self.in_phase(owner, name, phase)
        self.of_kind(accelerate.data_loader, "send_to_device", "inputs")
        self.of_kind(GaudiTrainer, "_prepare_inputs", "inputs")
        self.install_deepspeed()
        script = Path(self.plan["script"]).name
        if script == "merge_peft_adapter.py":
            self.install_merge()
        if script == "run_generation.py":
            self.install_generation()
        if script == "dpo.py":
            self.install_preference()
        if dry.is_wanted:
            self.trust_values()
        if self.plan.get("probe") is not None:  # what a dry card cannot show was seen elsewhere
            self.replace(attention, "probe", lambda *_, **__: attention.ProbeResult(**self.plan["probe"]))
            self.replace(head, "find_difference", lambda *_: None)
            self.replace(Samples, "_generate", lambda samples: [[] for _ in samples.ids])
        if self.plan.get("whole_logits"):
            for module in (supervised, preference):
                self.replace(module, "find_head", lambda *_: None)

    def trust_values(self) -> None:
        """Skips what a dry card cannot do: look at weights, and hear other ranks."""
        from align.generation import probing
        from align.training import checkpoints, gate, ranks, reliable

        for owner, name, answer in (
            (gate.Gate, "check", lambda *_: {"tensors": 0, "elements": 0}),
            (gate.Movement, "count_changed", lambda *_: 1),
            (reliable.ReliableMixin, "_highest", lambda _, votes: [int(vote) for vote in votes]),
            (reliable.ReliableMixin, "_are_finite", lambda *_: True),
            (ranks, "_distributed", lambda: False),
            (probing, "find_fault", lambda *_: None),
            (checkpoints, "hash_file", lambda _: ""),  # of holes as large as the files will be
        ):
            self.replace(owner, name, answer)

    def install_deepspeed(self) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            return
        from deepspeed.runtime.engine import DeepSpeedEngine
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        self.in_phase(DeepSpeedEngine, "step", "optimizer")
        for owner, name, kind in (
            (PartitionedParameterCoordinator, "fetch_sub_module", "gathered"),
            (GatheredParameters, "__enter__", "gathered"),
            (DeepSpeedZeroOptimizer_Stage3, "__init__", "optimizer"),
            (DeepSpeedZeroOptimizer, "__init__", "optimizer"),
        ):
            self.of_kind(owner, name, kind)

    def install_merge(self) -> None:
        """Everything but the bytes: the merge is planned from headers, and its files are written as holes."""
        import merge_peft_adapter
        from align.merge import writing

        def write(plan, folder: Path, workers: int, check: bool, report: Callable) -> None:
            for file, tensors in plan.files.items():
                header = writing._header(tensors)
                with (folder / file).open("wb") as out:
                    out.write(header)
                    out.truncate(len(header) + sum(tensor.nbytes for tensor in tensors))
            if list(plan.files) != ["model.safetensors"]:
                places = {tensor.name: file for file, tensors in plan.files.items() for tensor in tensors}
                index = {"metadata": {"total_size": plan.nbytes}, "weight_map": places}
                (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            read = plan.nbytes + sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            self.seen["merge"] = {
                "bytes": plan.nbytes,
                "moved": read,
                "changed": sum(not tensor.is_copy for tensor in plan.tensors),
                "tensors": len(plan.tensors),
            }

        self.replace(merge_peft_adapter, "write_files", write)
        self.replace(merge_peft_adapter, "verify_files", lambda *_: None)
        self.replace(merge_peft_adapter, "check_disk", lambda *_: None)  # the report looks where the real run writes

    def install_generation(self) -> None:
        import run_generation
        from align.generation.decoding import TextGenerator

        def answer_all(native, generator, prompts, encoded, batches, *args, **kwargs):
            """Rehearses the widest of several batches: the others need less."""
            lengths = list(map(len, encoded))
            self.seen["data"]["prompts"] = {"samples": len(prompts), "tokens": sum(lengths), "longest": max(lengths)}
            self.seen["shapes"] = [
                {"shapes": [generator.rows, batch.width], "tokens": generator.rows * batch.width} for batch in batches
            ]
            if self.plan.get("probe") is not None:
                batches = [max(batches, key=lambda batch: batch.width)]
            return native(generator, prompts, encoded, batches, *args, **kwargs)

        self.around(run_generation, "answer_all", answer_all)
        self.around(TextGenerator, "generate", self.generate)

    def generate(self, native, generator, *args, **kwargs):
        """The cache is as long as it will be after the first tokens, and each token then like the one before."""
        model, passes = generator.model, itertools.count(1)
        self.ledger.vocabulary = model.config.get_text_config().vocab_size
        self.ledger.name_modules(model)
        self.seen["graphs_by_pass"] = []

        def look(*_) -> None:
            for layer in [getattr(generator.stepper, "past", None), *_find_caches(model)]:
                for states in tree_leaves(layer):
                    self.ledger.mark(states if isinstance(states, torch.Tensor) else None, "cache")
            if next(passes) > 1:
                self.seen["graphs_by_pass"].append(self.graphs.distinct)
            if len(self.seen["graphs_by_pass"]) == GENERATED and self.plan.get("probe") is not None:
                raise Enough

        hook = model.register_forward_pre_hook(look)
        try:
            with self.ledger.phase("generation"):
                return native(generator, *args, **kwargs)
        finally:
            hook.remove()

    def install_preference(self) -> None:
        """Computes only the largest batches of a reference that is computed before training, to see what they need."""
        from align.training.preference import PreferenceTrainer

        def batches(native, trainer, *args, **kwargs):
            loader = native(trainer, *args, **kwargs)
            return self.largest_first(loader, EVALUATED)[0] if "Reference" in args else loader

        self.in_phase(PreferenceTrainer, "_compute_reference", "evaluation")
        if self.plan.get("probe") is not None:
            self.around(PreferenceTrainer, "_get_dataloader", batches)

    def around(self, owner, name: str, wrapper: Callable) -> None:
        native = getattr(owner, name)
        self.replace(owner, name, functools.wraps(native)(lambda *args, **kwargs: wrapper(native, *args, **kwargs)))

    def replace(self, owner, name: str, value) -> None:
        self.stack.callback(setattr, owner, name, vars(owner).get(name, getattr(owner, name)))
        setattr(owner, name, value)

    def in_phase(self, owner, name: str, phase: str) -> None:
        def wrapper(native, *args, **kwargs):
            with self.ledger.phase(phase):
                return native(*args, **kwargs)

        self.around(owner, name, wrapper)

    def of_kind(self, owner, name: str, kind: str) -> None:
        def wrapper(native, *args, **kwargs):
            with self.ledger.kind(kind):
                return native(*args, **kwargs)

        self.around(owner, name, wrapper)

    # Model and data

    def loads(self, name: str, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

        files = [path.stat().st_size for path in Path(name).glob("*.safetensors")]
        size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
        cast = sum(tensor.numel() * dtype.itemsize for tensor in weights.values() if tensor.dtype != dtype)
        self.seen["loaded"].append(
            {
                "name": name,
                "file": max(files, default=size),
                "shared": size,  # the ranks of a node map the same files
                "own": cast,  # what a rank holds besides, as its number format is another
                "in_parts": is_deepspeed_zero3_enabled(),
            }
        )

    def report_data(self, native, name: str, prepared) -> None:
        native(name, prepared)
        about = {"dropped": prepared.dropped or {}, "told": {}}
        for note, (count, place) in prepared.notes.items():
            about["told"][note] = count
            stops = self.seen.setdefault("stops", [])
            text = f"--chat_template: {note}, first"
            if note.startswith(NOT_SHOWN) and not any(stop.startswith(text) for stop in stops):
                stops.append(f"{text} {place}: the model would never see it")
        if hasattr(prepared.rows, "column_names") and hasattr(prepared.rows, "__len__"):
            lengths = read_numbers(prepared.rows, "length")
            about["samples"] = len(lengths)
            about["tokens"] = int(lengths.sum())
            about["longest"] = int(lengths.max())
            if "trained" in prepared.rows.column_names:
                about["trained_share"] = float(read_numbers(prepared.rows, "trained").sum() / about["tokens"])
        else:
            about["stream"] = True
        self.seen["data"][name] = about

    def know_model(self, trainer) -> None:
        model = trainer.model
        self.ledger.vocabulary = model.config.get_text_config().vocab_size
        self.ledger.name_modules(model)
        numbers = {True: 0, False: 0}
        for name, parameter in model.named_parameters():
            held = getattr(parameter, "ds_tensor", parameter)
            self.ledger.mark(held, "adapter" if "lora_" in name else "weights")
            numbers[parameter.requires_grad] += getattr(parameter, "ds_numel", parameter.numel())
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: self.ledger.mark(p.grad, "gradients"))
        adapted = [name.rpartition(".")[0] for name, _ in model.named_modules() if name.endswith(".lora_A")]
        self.seen["model"] = {
            "type": model.config.model_type,
            "parameters": sum(numbers.values()),
            "trained": numbers[True],
            "adapted": dict(Counter(name.rpartition(".")[2] for name in adapted)),
            "layers": getattr(model.config.get_text_config(), "num_hidden_layers", None),
        }
        reference: Any = getattr(trainer, "ref_model", None)
        for parameter in reference.parameters() if reference else ():
            self.ledger.mark(getattr(parameter, "ds_tensor", parameter), "reference")

    # Training

    def train(self, native, trainer, *args, **kwargs):
        trainer.add_callback(_callback(self))
        self.trainer = trainer
        self.know_model(trainer)
        args_ = trainer.args
        self.seen["run"] = {
            "world_size": args_.world_size,
            "accumulation": args_.gradient_accumulation_steps,
            "max_steps": args_.max_steps,
            "save_steps": 0,  # until training begins
            "save_total_limit": args_.save_total_limit,
            "output_dir": args_.output_dir,
        }
        self.seen["before"] = {"flops": self.ledger.flops, "bytes_sent": self.ledger.bytes_sent}
        self.in_training, self.began = True, time.monotonic()
        self.ledger.begin("optimizer")
        try:
            return native(trainer, *args, **kwargs)
        finally:
            self.in_training = False

    def training_step(self, native, trainer, model, inputs, *args, **kwargs):
        self.micro_batches.append(_describe(inputs))
        self.ledger.begin("forward")
        try:
            return native(trainer, model, inputs, *args, **kwargs)
        finally:
            self.ledger.begin("optimizer")

    def train_batches(self, native, trainer):
        loader, self.seen["shapes"] = self.largest_first(native(trainer))
        return loader

    def eval_batches(self, native, trainer, *args, **kwargs):
        return self.largest_first(native(trainer, *args, **kwargs), EVALUATED)[0]

    def largest_first(self, loader, most: int | None = None) -> tuple["LargestFirst", list[dict]]:
        """The loader, its largest batch in front, and the shapes of its first batches."""
        shapes = [_describe(batch) for batch in itertools.islice(iter(loader), LOOKED_AT)]
        largest = max(range(len(shapes)), key=lambda number: shapes[number]["tokens"], default=0)
        return LargestFirst(loader, largest, most), shapes

    def step_ended(self, control) -> None:
        ledger, before = self.ledger, self.seen["steps"][-1] if self.seen["steps"] else {}
        ledger.leave_out_host()
        self.seen["steps"].append(
            {
                "live": shown(ledger.live),
                "total": ledger.total,
                "graphs": self.graphs.distinct,
                "at": time.monotonic(),
                "flops": ledger.flops,
                "bytes_sent": ledger.bytes_sent,
                "shapes": [batch["shapes"] for batch in self.micro_batches[before.get("micro_batches", 0) :]],
                "micro_batches": len(self.micro_batches),
            }
        )
        enough = time.monotonic() - self.began > self.plan.get("seconds", 0)
        if len(self.seen["steps"]) >= self.plan.get("steps", 1) and (
            enough or len(self.seen["steps"]) >= self.plan.get("most_steps", 8)
        ):
            control.should_training_stop = control.should_save = True


class LargestFirst:
    """A data loader that begins with its largest batch, and may end early."""

    def __init__(self, loader, largest: int, most: int | None = None):
        self.loader, self.largest, self.most = loader, largest, most

    def __getattr__(self, name: str):
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader) if self.most is None else min(self.most, len(self.loader))

    def __iter__(self) -> Iterator:
        return itertools.islice(self._reordered(), self.most)

    def _reordered(self) -> Iterator:
        yield next(itertools.islice(iter(self.loader), self.largest, None))
        for number, batch in enumerate(self.loader):
            if number != self.largest:
                yield batch


def _find_caches(model: torch.nn.Module) -> list[torch.Tensor]:
    """Of attention layers that keep keys and values inside (--reuse_cache)."""
    return [module.cache for module in model.modules() if type(module).__name__ == "KVCache"]


def _describe(batch: dict) -> dict:
    """Shape and useful share of a micro-batch."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    ids = tensors.get("input_ids")
    return {
        "shapes": list(ids.shape) if ids is not None else [],
        "tokens": ids.numel() if ids is not None else sum(value.numel() for value in tensors.values()),
    }


def _callback(watcher: Watcher):
    from transformers import TrainerCallback

    class StepEnds(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):  # where epochs and shares have become steps
            saves = {"steps": state.save_steps, "epoch": state.max_steps / state.num_train_epochs}
            watcher.seen["run"] |= {
                "max_steps": state.max_steps,
                "save_steps": saves.get(str(args.save_strategy.value), 0),
            }

        def on_step_end(self, args, state, control, **kwargs):
            watcher.step_ended(control)

    return StepEnds()
