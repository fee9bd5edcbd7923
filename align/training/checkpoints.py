"""Checkpoints that are whole or not there, and what a resumed run must have in common with the one that wrote them.

A checkpoint is written as `unfinished-checkpoint-N`. When all ranks have written their part, `manifest.json` lists
every file with its size and hash, everything is flushed to the disk, and one rename makes it `checkpoint-N`. The disk
takes its time for that: it is done beside the steps that follow.
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash
from datasets import Dataset, IterableDataset
from safetensors import SafetensorError
from transformers import TrainerState

from align import __version__
from align.data.files import is_readable
from align.data.loading import find_source
from align.data.packing import drop_pages
from align.data.tokenization import SampleTokenizer
from align.errors import InputError
from align.merge.checkpoints import identify_files, identify_folder
from align.training.ranks import all_ranks, first_of_all_ranks, on_rank_0
from align.upstream_fixes import gaudi_config
from align.whole import flush, put_in_place, write_file

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
MANIFEST_VERSION = 2  # 1 had no hash of the manifest itself
# What those who read it need: one that was edited by hand may hold anything
NEEDED: dict[str, Any] = {
    "step": int,
    "world_size": int,
    "resumable": bool,
    "files": dict,
    "facts": dict,
    "flags": dict,
}
NEEDED |= {"order": str | None, "progress": dict}
NEEDED_OF_STATE: dict[str, Any] = {
    "global_step": int,
    "log_history": list,
    "stateful_callbacks": dict,
    "total_flos": int | float,
    "num_input_tokens_seen": int,
    "best_metric": int | float | None,
    "best_global_step": int | None,
    "best_model_checkpoint": str | None,
}
LATER = {"settings": dict, "software": dict}  # the release before had none
SUMS = ("total_loss", "unlogged_loss", "last_logged_step", "nonfinite_steps")
UNFINISHED = "unfinished-"
CHUNK = 1 << 22  # bytes read at once
PACKAGES = ("optimum-habana", "transformers", "accelerate", "peft", "trl", "torch", "habana-torch-plugin")
SECRETS = ("token", "hub_token", "push_to_hub_token")


@dataclass
class RunArguments:
    """How a run goes on after an interruption, when it gives up, and what it shows of itself."""

    _argument_group_name = "Evaluation, logs and checkpoints"

    resume: str = field(
        default="no",
        metadata={
            "help": "`auto` goes on from the last whole checkpoint, if there is one.",
            "choices": ["no", "auto"],
        },
    )
    save_seconds: float = field(
        default=0, metadata={"help": "Also save a checkpoint whenever this many seconds have passed; 0: never."}
    )
    sample_prompts: int = field(
        default=0, metadata={"help": "Show answers to this many held-out prompts, before and after training."}
    )
    max_nonfinite_steps: int = field(
        default=3,
        metadata={"help": "End the run after this many steps whose loss or gradient was not finite."},
    )


# ---------------------------------------------------------------- files


def hash_file(path: Path) -> str:
    """xxh3-128: against accidents, at the speed of memory."""
    digest, buffer = xxhash.xxh3_128(), bytearray(CHUNK)
    with open(path, "rb") as file:
        while size := file.readinto(buffer):
            digest.update(memoryview(buffer)[:size])
    return digest.hexdigest()


def list_files(folder: Path) -> list[str]:
    """Paths within `folder`, in an order that all ranks agree on; the manifest itself is not among them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [str(path.relative_to(folder)) for path in paths if path != folder / MANIFEST]


def seal(folder: Path) -> dict[str, dict]:
    """Flushes and describes the files: size and hash by name."""
    names = list_files(folder)
    with ThreadPoolExecutor() as pool:  # the disk writes while others read what memory still has
        flushes = [pool.submit(flush, folder / name) for name in names]
        described = dict(zip(names, pool.map(lambda name: _describe(folder / name), names), strict=True))
        for flushed in flushes:
            flushed.result()
    return described


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "xxh3_128": hash_file(path)}


def write_manifest(folder: Path, files: Mapping[str, dict], about: Mapping[str, Any]) -> None:
    """With a hash of itself: a bit that flips in it would else be another seed, or another step."""
    manifest = _plain({"version": MANIFEST_VERSION, **about, "files": dict(sorted(files.items()))})
    write_file(folder / MANIFEST, json.dumps({**manifest, "xxh3_128": _hash_manifest(manifest)}, indent=1))


def _hash_manifest(manifest: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def commit(folder: Path, final: Path, about: Mapping[str, Any]) -> None:
    """Makes `folder`, in which all is written, the checkpoint `final`: from here on it is whole."""
    write_manifest(folder, seal(folder), about)
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        flush(path)
    put_in_place(folder, final)  # also of one of the same step, from before a resume


@contextlib.contextmanager
def noting_disk_errors(noted: list[str]) -> Iterator[None]:
    """Adds to `noted` why the disk did not take what the block writes, by Python, safetensors or torch.save."""
    try:
        yield
    except OSError as error:
        noted.append(f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else ""))
    except (SafetensorError, RuntimeError) as error:
        first, _, reason = str(error).partition("I/O error: ")
        # torch.save does not say why; the last of these texts is of a folder that could not be made.
        signs = ("PytorchStreamWriter", "inline_container", "Parent directory")
        if not reason and not any(sign in first for sign in signs):
            raise
        noted.append(reason or "a file could not be written whole; is the disk full?")


def read_manifest(folder: Path) -> Any:
    """A dict; None where the manifest is missing, damaged or of another version."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        own_hash = manifest.pop("xxh3_128", None)
        wanted = {1: None, MANIFEST_VERSION: _hash_manifest(manifest)}
        is_whole = wanted[manifest["version"]] == own_hash and all(
            isinstance(file["xxh3_128"], str) and isinstance(file["size"], int) for file in manifest["files"].values()
        )
        return manifest if is_whole and _is_complete(manifest) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _is_complete(manifest: Mapping[str, Any]) -> bool:
    kinds = NEEDED | {name: kind for name, kind in LATER.items() if name in manifest}
    progress = manifest["progress"]
    sums = [progress[name] for name in SUMS] + [progress.get("left_out", 0)]
    return (
        all(isinstance(manifest[name], kind) for name, kind in kinds.items())
        and all(isinstance(each, int | float) for each in sums)
        and isinstance(progress.get("answers", {}), dict)
        and 0 <= progress["last_logged_step"] <= manifest["step"]
    )


def _find_damage_of_manifest(folder: Path) -> str:
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} is missing: not finished, or of another program"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        version = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["version"]
        if isinstance(version, int) and version not in (1, MANIFEST_VERSION):
            return f"its version is {version}, this release reads {MANIFEST_VERSION}: go on with the one that wrote it"
    return f"{MANIFEST} is damaged"


def find_damage(folder: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """What keeps `folder` from being a whole checkpoint; of several ranks each reads its share of the files."""
    manifest = read_manifest(folder)
    if manifest is None:
        return _find_damage_of_manifest(folder)
    if more := sorted(set(list_files(folder)) - set(manifest["files"])):
        return f"{more[0]} is not in its {MANIFEST}"
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
    for name in list(manifest["files"])[rank::ranks]:
        try:
            changed = hash_file(folder / name) != manifest["files"][name]["xxh3_128"]
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if changed:
            return f"{name} is not what was written"
    return _find_contradiction(folder, manifest)


def _find_contradiction(folder: Path, manifest: Mapping[str, Any]) -> str | None:
    """What a resume would take in place of the manifest's step, from files that were edited until their hashes fit."""
    if not manifest["resumable"]:
        return None
    try:
        state = vars(TrainerState.load_from_json(str(folder / STATE)))
    except (OSError, ValueError, TypeError, RecursionError):
        return f"{STATE} is not that of a trainer"
    is_whole = all(isinstance(state[name], kind) for name, kind in NEEDED_OF_STATE.items())
    if not is_whole or not all(isinstance(entry, dict) and "step" in entry for entry in state["log_history"]):
        return f"{STATE} is not that of a trainer"
    if state["global_step"] != manifest["step"]:
        return f"{STATE} is of step {state['global_step']}, {MANIFEST} of step {manifest['step']}"
    latest = folder / "latest"  # DeepSpeed's
    if latest.is_file() and latest.read_text(errors="replace").strip() not in {path.name for path in folder.iterdir()}:
        return "latest names no folder of it"
    return None


# ---------------------------------------------------------------- choosing


def step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def list_checkpoints(output: Path) -> list[Path]:
    """The checkpoints in `output`, the newest first, whole or not."""
    found = [path for path in output.glob("checkpoint-*") if path.is_dir() and re.fullmatch("[0-9]+", path.name[11:])]
    return sorted(found, key=step_of, reverse=True)


def shared_damage(folder: Path, rank: int, ranks: int) -> str | None:
    return first_of_all_ranks(find_damage(folder, rank, ranks))


def find_last(output: Path, rank: int, ranks: int) -> Path | None:
    """The newest whole checkpoint, None where there is none; a line names each newer one that is not whole.

    Raises an InputError where one is left that may be whole for another release, or for whoever renamed it.
    """
    unfinished = sorted(path.name for path in output.glob(f"{UNFINISHED}checkpoint-*"))
    for name in all_ranks(unfinished)[0]:
        logger.warning(f"{output / name} was being written when its run ended; it is left out")
    skipped: dict[Path, str] = {}
    foreign: list[Path] = []
    for name in all_ranks([path.name for path in list_checkpoints(output)])[0]:
        damage = shared_damage(output / name, rank, ranks)
        manifest = read_manifest(output / name)
        if manifest is None or damage is None:
            foreign.append(output / name)
        if damage is None and not manifest["resumable"]:
            damage = "made with --save_only_model: it holds no optimizer"
        if damage is None and manifest["step"] != step_of(output / name):
            damage = f"it is of step {manifest['step']}, under another name"
        if damage is None:
            for newer, reason in skipped.items():
                logger.warning(f"{newer} cannot be resumed ({reason}); looking for the one before it")
            return output / name
        skipped[output / name] = damage
    if foreign:
        raise InputError(
            f"--output_dir: {output} holds checkpoints but none to go on from; {foreign[0]} cannot be resumed "
            f"({skipped[foreign[0]]}); name another folder, or add --overwrite_output_dir without --resume to replace "
            "them"
        )
    for torn, reason in skipped.items():
        logger.warning(f"{torn} cannot be resumed ({reason}), and there is none before it")
    return None


# ---------------------------------------------------------------- which run it is of

# Flags that decide the rows, their order, the loss or the shape of the optimizer's state. A line names others.
SAME = {
    "seed", "data_seed", "packing", "pad_max", "max_seq_length", "max_length", "max_prompt_length", "truncation",
    "train_on_prompt", "share_prompts", "gradient_accumulation_steps", "streaming", "shuffle_buffer", "split", "subset",
    "dataset_mix", "columns", "text_as_chat", "only_true_labels",
    "use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "bf16", "torch_dtype", "optim",
    "label_smoothing_factor", "neftune_noise_alpha",
    "loss_type", "beta", "label_smoothing", "rpo_alpha", "reference_free", "sync_ref_model", "ref_model_mixup_alpha",
    "ref_model_sync_steps", "f_divergence_type", "f_alpha_divergence_coef", "ignore_data_skip", "disable_dropout",
    "gaudi_config_name use_fused_adam",  # a setting
}  # fmt: skip
# Of a stream these too decide which rows are read, which nobody can compare
SAME_OF_STREAMS = {"size_valid_set", "max_train_samples", "do_eval", "data_format", "bad_rows", "num_buckets"}
# These too where the optimizer's settings come from the checkpoint and not from the flags, and so do its file's
SAME_IF_RESTORED = {
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_type",
    "lr_scheduler_kwargs",
}  # fmt: skip
# Settings beside flags: what the best checkpoint so far was chosen by
HELD_OUT = "dataset_name held-out rows"
CHOSEN_BY = ("metric_for_best_model", "greater_is_better", HELD_OUT)
OF_OPTIMIZER = "deepspeed optimizer."  # settings; those of a scheduler in the same file are taken as they are now
# Flags that change with every command, or do not change what is learnt; of --deepspeed the settings are told
UNTOLD = {
    "resume", "resume_from_checkpoint", "overwrite_output_dir", "output_dir", "logging_dir", "run_name", "local_rank",
    "model_name_or_path", "tokenizer_name_or_path", "ref_model", "dataset_name", "deepspeed", "deepspeed_plugin",
    "distributed_state", "world_size",
}  # fmt: skip


DATED = (
    "the chat template writes the date, so rows that are no longer in the cache are others on another day: name a copy "
    "of the template with --chat_template that holds the date on which the run began"
)


@dataclass
class Run:
    """A run as its checkpoints describe it."""

    flags: dict[str, Any]
    facts: dict[str, Any]  # what must not differ, beside the flags in `SAME`
    settings: dict[str, Any]  # of files that flags name, as "deepspeed zero_optimization.stage"
    writes_date: bool = False  # the chat template does

    @classmethod
    def of(
        cls,
        script: str,
        parsed: Iterable,
        prepared: Mapping[str, Any],
        folder: str,
        models: Mapping[str, str],
        tokenizer: SampleTokenizer,
    ) -> "Run":
        """`parsed` are the dataclasses of the command line, `prepared` the splits, `folder` as in `prepare_data`.

        `models` is what identifies each model by its flag.
        """
        *_, data_args, args = [each for each in parsed if hasattr(each, "dataset_name") or hasattr(each, "output_dir")]
        flags = {one.name: _plain(getattr(each, one.name, None)) for each in parsed for one in fields(each)}
        flags = {name: value for name, value in flags.items() if name not in SECRETS and not name.startswith("_")}
        train = prepared.get("train")
        is_stream = train is not None and isinstance(train.rows, IterableDataset)
        names = [data_args.dataset_name] if isinstance(data_args.dataset_name, str) else data_args.dataset_name
        template = tokenizer.fingerprint if is_stream else None  # else the tokens tell
        sources = {name: find_source(name, data_args.subset, folder) for name in names}
        facts = {
            "script": script,
            **models,
            "--dataset_name": train and on_rank_0(lambda: identify_rows(train.rows, sources)),
            "--tokenizer_name_or_path or --chat_template": template,
            "--deepspeed": _sharing(args),
            "optimizer and number format in the file of --deepspeed": _decided_by_deepspeed(args),
            "number of rows of all ranks (--per_device_train_batch_size x ranks)": str(
                args.per_device_train_batch_size * args.world_size
            ),
        }
        settings = {f"gaudi_config_name {key}": value for key, value in vars(gaudi_config(args)).items()}
        if args.deepspeed is not None:
            settings |= {f"deepspeed {key}": value for key, value in _flatten(args.hf_deepspeed_config.config)}
        if "validation" in prepared:
            settings[HELD_OUT] = on_rank_0(lambda: identify_rows(prepared["validation"].rows, sources))
        return cls(flags | {"world_size": args.world_size}, facts, _plain(settings), tokenizer.template.writes_date)

    def check(self, checkpoint: str | None) -> None:
        """Refuses a checkpoint of a run that learnt something else; logs what else has changed since."""
        if checkpoint is None:
            return
        folder, manifest = Path(checkpoint), read_manifest(Path(checkpoint))
        changed = self._find_changes(manifest)
        told = [f"--{name} {_short(a)} -> {_short(b)}" for name, (a, b) in changed.items() if name not in UNTOLD]
        self._refuse_another(folder, manifest, changed, told)
        if manifest["world_size"] != self.flags["world_size"]:
            told.append(f"ranks {manifest['world_size']} -> {self.flags['world_size']} (dropout is drawn anew)")
        before = manifest.get("software", {})
        told += [f"{name} {before[name]} -> {now}" for name, now in software().items() if before.get(name, now) != now]
        if told:
            logger.info(f"changed since {folder}: {', '.join(told)}")

    def _refuse_another(
        self, folder: Path, manifest: Mapping[str, Any], changed: Mapping[str, tuple], told: list[str]
    ) -> None:
        """Refuses a checkpoint of a run that would have taken other steps."""
        facts = manifest["facts"]
        for name, value in self.facts.items():
            if name in facts and facts[name] != value:
                short = f"{_short(facts[name])} then, {_short(value)} now"
                if name == "--dataset_name":
                    short += "; other rows, tokenizer or chat template"
                    short += f"; {DATED}" if self.writes_date else ""
                also = f"; changed since: {', '.join(told)}" if told else ""
                raise InputError(f"{folder} was made with another {name}: {short}{also}")
        is_stream = self.facts["--tokenizer_name_or_path or --chat_template"] is not None
        restored = self._find_restored(manifest)
        for name, (before, now) in changed.items():
            decides = name in SAME or (is_stream and name in SAME_OF_STREAMS)
            is_restored = restored and (name in SAME_IF_RESTORED or name.startswith(OF_OPTIMIZER))
            if decides or is_restored:
                why = "" if decides else f", but {restored} goes on as it was saved"
                raise InputError(
                    f"{folder} was made with --{name} {_short(before)}, this is {_short(now)}{why}; "
                    "give the same, or another --output_dir"
                )
        sharded = self.facts["--deepspeed"] != "none"
        if sharded and manifest["world_size"] != self.flags["world_size"]:
            raise InputError(
                f"{folder} holds the shards of {manifest['world_size']} ranks, these are "
                f"{self.flags['world_size']}; start as many as before, as DeepSpeed wants"
            )

    def find_other_choice(self, manifest: Mapping[str, Any]) -> str | None:
        """Says by what the best checkpoint so far was chosen, where that has changed since."""
        changed = self._find_changes(manifest)
        return next((f"was chosen by another --{name}" for name in CHOSEN_BY if name in changed), None)

    def _find_changes(self, manifest: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """What flags and settings were, and are now."""
        settings = manifest.get("settings", self.settings)  # the release before had none
        flags = {name: _as_value(value) for name, value in manifest["flags"].items()}
        pairs = {name: (flags[name], value) for name, value in self.flags.items() if name in flags}
        names = sorted(settings.keys() | self.settings.keys())
        pairs |= {name: (settings.get(name), self.settings.get(name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def _find_restored(self, manifest: Mapping[str, Any]) -> str | None:
        """What takes its settings from the checkpoint: other optimizers and schedules are made anew from the flags."""
        if "reduce_lr_on_plateau" in (manifest["flags"].get("lr_scheduler_type"), self.flags["lr_scheduler_type"]):
            return "the schedule"
        settings = [*manifest.get("settings", ()), *self.settings]
        return "the optimizer of DeepSpeed's file" if any(name.startswith(OF_OPTIMIZER) for name in settings) else None


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings of nested objects, as ("zero_optimization.stage", 3)."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _plain(value: Any) -> Any:
    """The value as JSON gives it back."""
    return json.loads(json.dumps(value, default=lambda each: each.value if isinstance(each, Enum) else str(each)))


def _as_value(value: Any) -> Any:
    """The release before wrote the name of an enum's member, where a command line has its value."""
    return str(value).removeprefix("FDivergenceType.").lower() if "FDivergenceType." in str(value) else value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _sharing(args: Any) -> str:
    if args.deepspeed is None:
        return "none"
    config = args.hf_deepspeed_config.config
    return f"ZeRO-{config.get('zero_optimization', {}).get('stage', 0)}"


def _decided_by_deepspeed(args: Any) -> str | None:
    """What the file decides of the steps in place of --optim and --bf16."""
    if args.deepspeed is None:
        return None
    file = args.hf_deepspeed_config
    bfloat16 = file.get_value("bf16.enabled", False)
    return f"{file.get_value('optimizer.type')}, bf16 {args.bf16 if bfloat16 == 'auto' else bfloat16}"


@cache  # which costs as much as a third of an adapter's checkpoint
def software() -> dict[str, str]:
    return {"gaudi-align": __version__, **{name: version(name) for name in PACKAGES}}


def identify_rows(rows: Dataset | IterableDataset, sources: Mapping[str, Path]) -> str:
    """A hash of all tokens; for a stream, which nobody has read, of its names, or of its local files."""
    digest = xxhash.xxh3_128()
    if isinstance(rows, IterableDataset):
        return f"stream {' '.join(_identify_source(name, path) for name, path in sources.items())}"
    columns = [column for column in rows.column_names if column not in ("length", "trained")]
    table = rows.select_columns([*columns]).with_format("arrow")
    for part in table.iter(batch_size=10_000):
        for column in columns:
            array = part[column].combine_chunks()
            digest.update(array.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            digest.update(array.flatten().to_numpy(zero_copy_only=False).tobytes())
        drop_pages(rows)
    return digest.hexdigest()


def _identify_source(name: str, path: Path) -> str:
    """Reads some 4 MiB of all files together, as the other ranks wait and a stream may have thousands of shards."""
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and is_readable(file)]
        return identify_files(files, pieces=64)
    return identify_files([path], pieces=64) if path.is_file() else name


def identify_model(name: str, commit: str | None) -> str:
    """Identifies a model: by a hash of its files in a local folder, by its commit on the hub. All ranks call it."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name} {commit}"
    return on_rank_0(lambda: identify_folder(folder))
