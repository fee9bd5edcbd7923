"""What --push_to_hub uploads while a run trains and at its end: the model, its card and results.

transformers' own way (trainer.py:4803 and :4878) writes training_args.bin, which holds --hub_token, and uploads every
file of the output folder: rows of the data too. An upload that fails in the background is never reported.
"""

import logging
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from align import output
from align.errors import InputError, ResultError, one_line
from align.hub import FAILURES
from align.training.checkpoints import MANIFEST, UNFINISHED, step_of

if TYPE_CHECKING:
    from optimum.habana import GaudiTrainer as Trainer
else:
    Trainer = object  # what the mixin stands in front of

logger = logging.getLogger(__name__)

KEPT_BACK = (output.LOCK, "checkpoint-*", "failed-*", f"{UNFINISHED}*", "bad_batch.jsonl", "examples.html", "_*")
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")  # of a checkpoint


class UploadingMixin(Trainer):
    """Stands among the first classes of a trainer."""

    push_in_progress: PushInProgress | None

    def init_hf_repo(self, token: str | None = None) -> None:
        try:
            super().init_hf_repo(token)
        except FAILURES as error:
            name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            raise InputError(f"--push_to_hub: {name} cannot be made: {one_line(error)}") from None

    def push_to_hub(self, commit_message: str = "End of training", **kwargs) -> None:
        """Uploads the output folder without rows and checkpoints. Raises a ResultError where that fails."""
        if not self.is_world_process_zero():
            return
        self._finish_current_push()
        try:
            self._upload(self.args.output_dir, commit_message, ignore_patterns=list(KEPT_BACK)).result()
        except FAILURES as error:
            raise ResultError(
                f"--push_to_hub: the model is saved in {self.args.output_dir} but not uploaded to {self.hub_model_id}: "
                f"{one_line(error)}"
            ) from None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Uploads a checkpoint in the background. A failure is logged and stops nothing: the next save tries again."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        pending = [job for job in self.push_in_progress.jobs if not job.done()] if self.push_in_progress else []
        if pending and not self.args.hub_always_push:
            return
        message = f"Training in progress, step {step_of(Path(checkpoint_folder))}"
        model = {"allow_patterns": list(MODEL_FILES), "ignore_patterns": ["trainer_state.json", MANIFEST]}
        jobs = [self._upload(checkpoint_folder, message, **model)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            all_of_them = self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS
            place = Path(checkpoint_folder).name if all_of_them else "last-checkpoint"
            jobs.append(self._upload(checkpoint_folder, f"{message}, checkpoint", path_in_repo=place))
        for job in jobs:
            job.add_done_callback(self._tell_failure)
        self.push_in_progress = PushInProgress([*pending, *jobs])

    def _upload(self, folder: str, message: str, **options) -> Future:
        return huggingface_hub.upload_folder(
            repo_id=self.hub_model_id,
            folder_path=folder,
            commit_message=message,
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            run_as_future=True,
            **options,
        )

    def _tell_failure(self, job: Future) -> None:
        if error := job.exception():
            logger.warning(f"--push_to_hub: a checkpoint was not uploaded to {self.hub_model_id}: {one_line(error)}")
