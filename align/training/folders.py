"""What may be written into --output_dir, and which checkpoint a run goes on from."""

import shutil
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from align.errors import InputError, check_seed

RUN_FILES = ("adapter_config.json", "adapter_model.*", "model*.safetensors", "pytorch_model*", "checkpoint-*")
RESULT_FILES = ("config.json", "generation_config.json", "model*.index.json", "*_results.json", "trainer_state.json")


def check_training_arguments(args, *models: str | None) -> str | None:
    """Finds what cannot work before anything is loaded; returns the checkpoint to resume from, if any.

    `models` are those that the run reads, which it must not replace.
    """
    if not (args.do_train or args.do_eval):
        raise InputError("nothing to do: give --do_train, --do_eval or both")
    check_seed(args.seed)
    if args.flash_attention_causal_mask and getattr(args, "packing", False):
        raise InputError("--flash_attention_causal_mask drops the mask that packing needs: add --packing False")
    output = Path(args.output_dir)
    if output.exists() and not output.is_dir():
        raise InputError(f"--output_dir: {output} is a file; name a folder")
    wanted = args.resume_from_checkpoint
    if wanted in (None, "False", "false"):
        held = next((path for name in RUN_FILES for path in output.glob(name)), None)
        if args.do_train and held is not None and not args.overwrite_output_dir:
            raise InputError(
                f"--output_dir: {output} holds another run ({held.name}); add --resume_from_checkpoint True to go on "
                "with it, --overwrite_output_dir to replace it, or name another folder"
            )
        replaced = [output.resolve(), *(path.resolve() for path in output.glob("checkpoint-*"))]
        used = next((model for model in models if model and Path(model).resolve() in replaced), None)
        if args.do_train and held is not None and used is not None:
            raise InputError(f"--overwrite_output_dir would replace {used}, which this run reads; name another folder")
        return None
    if wanted in ("True", "true"):
        checkpoint, place = get_last_checkpoint(str(output)) if output.is_dir() else None, output
    else:
        checkpoint = place = wanted
    if checkpoint is None or not Path(checkpoint).is_dir():
        raise InputError(f"--resume_from_checkpoint: no checkpoint at {place}")
    return checkpoint


def clear_output(args, checkpoint: str | None) -> None:
    """Removes what an earlier run left in --output_dir, where --overwrite_output_dir asks for it (rank 0).

    Else that run's last checkpoint might be resumed from, or its adapter be loaded on top of newly trained weights.
    """
    if checkpoint is None and args.overwrite_output_dir and args.should_save:
        for path in [path for name in RUN_FILES + RESULT_FILES for path in Path(args.output_dir).glob(name)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
