"""What the trainers of sft.py and dpo.py have in common: rows that come ready to compute, and all upstream's mends."""

import signal
from collections.abc import Mapping, Sequence
from typing import Any

from align.errors import ResultError
from align.models.attention import segment_mask
from align.training import folders, report, results
from align.training.checkpoints import noting_disk_errors
from align.training.reliable import ReliableMixin
from align.upstream_fixes import GraphedAccumulationMixin, StepsInPartsMixin, WholeStepsMixin, attention_inputs


class RowsMixin(ReliableMixin, WholeStepsMixin, StepsInPartsMixin, GraphedAccumulationMixin):
    """Trains on rows of few shapes that several samples share. Stands first among a trainer's classes.

    The collators of align/ return what a step needs and nothing else, so no column is taken out.
    """

    def train_and_evaluate(self, checkpoint: str | None, curves: Mapping[str, Sequence[str]]) -> None:
        """What the run was asked for, from `checkpoint` on; its folder keeps the figures, `curves` and the report."""
        if self.args.do_train:
            folders.clear_output(self.args, self.run_args, checkpoint)
            with self.heed_signals():  # between the two as well
                trained = self.train(resume_from_checkpoint=checkpoint)
                self.save_model()
            if self.signal:  # came after the last look at it
                signal.raise_signal(self.signal)
            results.save_results(self, "train", self.complete(trained.metrics))
        if self.args.do_eval:
            results.save_results(self, "eval", self.complete(self.evaluate()))
        self.samples.show("after")
        if self.args.do_train:
            errors: list[str] = []
            with noting_disk_errors(errors):
                results.save_history(self, curves)
                report.write_report(self, curves)
            if errors:
                raise ResultError(f"the model is in {self.args.output_dir}, but not all of its report: {errors[0]}")
            if self.args.push_to_hub:
                self.push_to_hub()

    def complete(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The figures of training or of the last evaluation, with what else is known of them."""
        return dict(metrics)

    def _remove_unused_columns(self, dataset, description=None):
        return dataset

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        return data_collator

    def _prepare_inputs(self, inputs: Mapping) -> dict[str, Any]:
        """On the device: segment ids become the mask that keeps samples of a row apart. Training caches nothing."""
        inputs = dict(super()._prepare_inputs(inputs))
        if "segment_ids" in inputs:
            ids = inputs.pop("segment_ids"), inputs["position_ids"], inputs.pop("branch_ids", None)
            with self.compute_loss_context_manager():
                inputs["attention_mask"] = segment_mask(self.model, *ids)
        return {**inputs, **attention_inputs(self.model), "use_cache": False}
