"""What may be written into --output_dir, and from which checkpoint a run goes on."""

import logging
from collections.abc import Sequence
from pathlib import Path

from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from align import output
from align.cli import given_value, read_boolean
from align.errors import InputError
from align.hub import check_login
from align.training import checkpoints
from align.training.checkpoints import UNFINISHED, RunArguments
from align.training.deepspeed_file import check_deepspeed
from align.training.optimizers import check_optimizer
from align.training.unused import check_unused
from align.upstream_fixes import gaudi_config
from align.whole import remove

logger = logging.getLogger(__name__)

HUB_FLAGS = ("hub_model_id", "hub_private_repo", "hub_always_push", "hub_revision")
WEIGHTS = ("adapter_model.*", "model*.safetensors", "pytorch_model*")
CHECKPOINTS = "checkpoint-*"
RUN_FILES = (*WEIGHTS, "adapter_config.json", CHECKPOINTS)
LEFTOVERS = (f"{UNFINISHED}*", "failed-*", ".*.[0-9]*.partial", "bad_batch.jsonl", checkpoints.MANIFEST)
RESULT_FILES = (
    *("config.json", "generation_config.json", "model*.index.json", "*_results.json", "trainer_state.json"),
    *("report.html", "README.md", "curves.png", "additional_chat_templates"),
)
WRITTEN = (".json", ".jsonl", ".jinja", ".model", ".txt", ".safetensors", ".html", ".md", ".png")
MOST_TOKENS = 1 << 26  # of a batch of a card
OF_OTHERS = ("README.md", "config.json")  # that a run would replace, where no run has left them
SIGNS = (*RUN_FILES, checkpoints.MANIFEST, "trainer_state.json", "report.html")  # that one has


def check_training_arguments(
    args, run_args: RunArguments, *models: str | None, measured: Sequence[str] = ("loss",)
) -> str | None:
    """Finds what cannot work before anything is loaded; returns the checkpoint to resume from, if any.

    `models` are those that the run reads, which it must not replace; `measured` is what an evaluation tells.
    """
    from habana_frameworks.torch.utils.internal import is_lazy

    if args.use_lazy_mode and not is_lazy():
        raise InputError(
            "--use_lazy_mode: this plugin is in eager mode; set the variable PT_HPU_LAZY_MODE=1 before the command"
        )
    check_unused(args)
    check_optimizer(args)
    check_deepspeed(args)
    gaudi_config(args)
    check_best(args, measured)
    if not (args.do_train or args.do_eval):
        raise InputError("nothing to do: give --do_train, --do_eval or both")
    if args.do_eval and not read_boolean(given_value("do_eval") or "True"):
        strategy = args.eval_strategy.value  # for which transformers turns --do_eval into True
        raise InputError(f"--do_eval False: --eval_strategy {strategy} evaluates; add --eval_strategy no")
    if args.do_train and args.max_steps <= 0 and not args.num_train_epochs:
        raise InputError("--num_train_epochs 0: nothing would be trained; give --num_train_epochs or --max_steps")
    if run_args.sample_prompts and not args.do_eval:
        raise InputError("--sample_prompts takes held-out prompts: add --do_eval")
    if args.eval_on_start and not args.do_eval:
        raise InputError("--eval_on_start evaluates on held-out rows: add --do_eval")
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise InputError("--dataloader_persistent_workers: there are none to keep; add --dataloader_num_workers 1")
    recomputes_fast = args.flash_attention_recompute and args.flash_attention_fast_softmax
    if args.do_train and recomputes_fast and not args.flash_attention_causal_mask:
        raise InputError(
            "--flash_attention_fast_softmax: a card's kernel has no gradients for it with --flash_attention_recompute "
            "and a mask; leave one of the two out"
        )
    if not args.do_train and (run_args.resume != "no" or _wanted_checkpoint(args)):
        flag = "--resume" if run_args.resume != "no" else "--resume_from_checkpoint"
        raise InputError(
            f"{flag} goes on with training: add --do_train; to evaluate a trained model, give --model_name_or_path"
        )
    folder = Path(args.output_dir)
    try:
        is_file, leads_nowhere = folder.exists() and not folder.is_dir(), folder.is_symlink() and not folder.exists()
    except OSError as error:  # a name that is too long
        raise InputError(f"--output_dir: {error.strerror}; name another folder") from error
    if is_file:
        raise InputError(f"--output_dir: {folder} is a file; name a folder")
    if leads_nowhere:
        raise InputError(f"--output_dir: {folder} is a link to a folder that is not there; make that, or remove it")
    if folder.is_dir() and (blocked := sorted(path for path in folder.glob("*") if _is_blocked(path))):
        what = "a folder" if blocked[0].is_dir() else "a link to nothing"
        raise InputError(f"--output_dir: {blocked[0]} is {what} where a file of that name is written; remove it")
    if not args.save_safetensors:
        raise InputError(
            "--save_safetensors False: weights are saved as safetensors alone, which run no code when read"
        )
    if args.remove_unused_columns:
        raise InputError(
            "--remove_unused_columns True has no effect here: the log names the columns that are not used; leave it out"
        )
    if args.auto_find_batch_size:
        raise InputError(
            "--auto_find_batch_size: batches have few fixed shapes here; try --per_device_train_batch_size by hand"
        )
    for name in HUB_FLAGS if not args.push_to_hub else ():
        if getattr(args, name):
            raise InputError(f"--{name} has no effect here: nothing is uploaded without --push_to_hub")
    if args.push_to_hub and args.process_index == 0:
        check_login(args.hub_model_id or folder.absolute().name, args.hub_token)
    if args.should_save and folder.is_dir():
        output.lock(folder)
    return find_checkpoint(args, run_args, *models) if args.do_train else None


def _is_blocked(path: Path) -> bool:
    return path.suffix in WRITTEN and (path.is_dir() or (path.is_symlink() and not path.exists()))


def check_best(args, measured: Sequence[str]) -> None:
    """What makes a checkpoint the best one is measured, and while training."""
    metric = args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in measured:
        raise InputError(f"--metric_for_best_model: got {metric}; choose from {', '.join(measured)}")
    if metric is None and args.save_strategy == SaveStrategy.BEST:
        raise InputError("--save_strategy best: needs to know by what; add --metric_for_best_model loss")
    for flag in ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"):
        if getattr(args, flag) not in (None, False) and args.eval_strategy == IntervalStrategy.NO:
            raise InputError(f"--{flag}: nothing is evaluated while training; add --eval_strategy steps --eval_steps N")


def check_batches(args, length: int, flag: str) -> None:
    """Refuses batches that no memory holds, which would end a process without a word, or take hours to make."""
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if (tokens := getattr(args, name) * length) > MOST_TOKENS:
            raise InputError(
                f"--{name} {getattr(args, name)} with {flag} {length}: a batch of {tokens:,} tokens; give at most "
                f"{MOST_TOKENS:,}"
            )


def check_foreign(args) -> None:
    """Refuses to replace what somebody else keeps in --output_dir, unless told to."""
    folder = Path(args.output_dir)
    foreign = next((name for name in OF_OTHERS if (folder / name).exists()), None)
    is_of_a_run = any(path for name in SIGNS for path in folder.glob(name))
    if args.do_train and foreign is not None and not is_of_a_run and not args.overwrite_output_dir:
        raise InputError(
            f"--output_dir: {folder} holds a {foreign} of no run, which would be replaced; name another folder, or add "
            "--overwrite_output_dir"
        )


def prepare_output(args) -> None:
    """Makes --output_dir (rank 0), for this run alone, where there is room for what it writes."""
    if args.should_save:
        output.prepare(Path(args.output_dir))
        if "tensorboard" in args.report_to:
            output.check_writable(Path(args.logging_dir), "--logging_dir")


def _wanted_checkpoint(args) -> str | None:
    return None if args.resume_from_checkpoint in (None, "False", "false") else args.resume_from_checkpoint


def find_checkpoint(args, run_args: RunArguments, *models: str | None) -> str | None:
    """The checkpoint that --resume or --resume_from_checkpoint ask for; refuses to write over another run unasked."""
    folder, wanted = Path(args.output_dir), _wanted_checkpoint(args)
    ranks = args.process_index, args.world_size
    held = next((path for name in RUN_FILES for path in folder.glob(name)), None)
    if run_args.resume == "auto" and (wanted or args.overwrite_output_dir):
        other = "--resume_from_checkpoint" if wanted else "--overwrite_output_dir"
        raise InputError(f"--resume auto contradicts {other}; give one of them")
    is_own = wanted in ("True", "true") or _is_in(folder, wanted)
    if is_own and args.overwrite_output_dir:
        raise InputError("--resume_from_checkpoint contradicts --overwrite_output_dir; give one of them")
    if run_args.resume == "auto":
        found = checkpoints.find_last(folder, *ranks)
        model = next((path for name in WEIGHTS for path in folder.glob(name)), None)
        if found is None and model is not None:
            raise InputError(
                f"--resume auto: {folder} holds a model ({model.name}) but no checkpoint to go on from; add "
                "--overwrite_output_dir without --resume to replace it, or name another folder"
            )
        return _as_text(found)
    if wanted in ("True", "true"):
        found = checkpoints.find_last(folder, *ranks)
        if found is None:
            raise InputError(f"--resume_from_checkpoint: no checkpoint at {folder}; --resume auto begins without one")
        return _as_text(found)
    if wanted:
        if not Path(wanted).is_dir():
            raise InputError(f"--resume_from_checkpoint: no checkpoint at {wanted}")
        if held_there := checkpoints.list_checkpoints(Path(wanted)):
            raise InputError(f"--resume_from_checkpoint: {wanted} holds checkpoints; name one, such as {held_there[0]}")
        if damage := checkpoints.shared_damage(Path(wanted), *ranks):
            raise InputError(f"--resume_from_checkpoint: {wanted} cannot be resumed: {damage}")
        manifest = checkpoints.read_manifest(Path(wanted))
        if not manifest["resumable"]:
            raise InputError(f"--resume_from_checkpoint: {wanted} was made with --save_only_model: it has no optimizer")
        newest = next(iter(checkpoints.list_checkpoints(folder)), None)
        if is_own and newest is not None and checkpoints.step_of(newest) > manifest["step"]:
            logger.warning(f"{newest} stays: until this run has come as far, --resume auto would go on from there")
        if is_own:
            return wanted
    if held is not None and not args.overwrite_output_dir:
        raise InputError(
            f"--output_dir: {folder} holds another run ({held.name}); add --resume auto to go on "
            "with it, --overwrite_output_dir to replace it, or name another folder"
        )
    replaced = [folder.resolve(), *(path.resolve() for path in folder.glob(CHECKPOINTS))]
    used = next((model for model in models if model and Path(model).resolve() in replaced), None)
    if held is not None and used is not None:
        raise InputError(f"--overwrite_output_dir would replace {used}, which this run reads; name another folder")
    return wanted


def _is_in(folder: Path, checkpoint: str | None) -> bool:
    return checkpoint is not None and Path(checkpoint).parent.resolve() == folder.resolve()


def page_of(args, name: str) -> Path | None:
    """A page in --output_dir, where the user named one (transformers makes up a folder else)."""
    return None if args.output_dir == "trainer_output" else Path(args.output_dir, name)


def _as_text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def clear_output(args, run_args: RunArguments, checkpoint: str | None) -> None:
    """Removes what an earlier run left in --output_dir where --overwrite_output_dir asks for it (rank 0).

    Else its last checkpoint might be resumed, or its adapter loaded on top of newly trained weights. Where --resume
    auto begins anew, what the earlier run left goes as well, but for checkpoints.
    """
    goes_on = _is_in(Path(args.output_dir), checkpoint)
    if not goes_on and (args.overwrite_output_dir or run_args.resume == "auto") and args.should_save:
        names = [*RUN_FILES, *RESULT_FILES, *LEFTOVERS]
        if not args.overwrite_output_dir:
            names.remove(CHECKPOINTS)  # one of a name that no run gives may be somebody's copy
        for path in [path for name in names for path in Path(args.output_dir).glob(name)]:
            remove(path)
