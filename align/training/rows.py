"""What the trainers of sft.py and dpo.py have in common: rows that come ready to compute, and all upstream's mends."""

from collections.abc import Mapping
from typing import Any

from align.models.attention import segment_mask
from align.training.reliable import ReliableMixin
from align.upstream_fixes import GraphedAccumulationMixin, StepsInPartsMixin, WholeStepsMixin, attention_inputs


class RowsMixin(ReliableMixin, WholeStepsMixin, StepsInPartsMixin, GraphedAccumulationMixin):
    """Trains on rows of few shapes that several samples share. Stands first among a trainer's classes.

    The collators of align/ return what a step needs and nothing else, so no column is taken out.
    """

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
