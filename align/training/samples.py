"""Greedy answers to held-out prompts, before and after training: what no loss shows."""

import itertools
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from align.data.packing import IGNORED
from align.models.loading import find_padding

logger = logging.getLogger(__name__)

SAMPLED_TOKENS = 128  # of each answer
FIRST_TOKENS = 16  # of a text without a prompt


class Samples(TrainerCallback):
    """Asks the trainer's model `prompts`, lists of token ids. `answers` has the texts `before` and `after` training."""

    def __init__(self, trainer: Any, prompts: list[list[int]], longest: int):
        self.trainer, self.ids, self.longest = trainer, prompts, longest
        self.answers: dict[str, list[str]] = {}

    @property
    def prompts(self) -> list[str]:
        return [self._decode(ids) for ids in self.ids]

    def on_train_begin(self, *args, **kwargs) -> None:
        if "before" not in self.answers:  # else a checkpoint has them
            self.show("before")

    @torch.no_grad()
    def show(self, when: str) -> None:
        """Prints the answers. Under ZeRO-3 every rank generates them."""
        if not self.ids:
            return
        self.answers[when] = [self._decode(answer) for answer in self._generate()]
        if self.trainer.is_world_process_zero():
            for prompt, answer in zip(self.prompts, self.answers[when], strict=True):
                print(f"\n[{when}] {prompt}\n{answer}", file=self.trainer.stdout)

    def _generate(self) -> list[list[int]]:
        trainer, args, tokenizer = self.trainer, self.trainer.args, self.trainer.processing_class
        pad_token_id = find_padding(tokenizer)
        model = trainer.accelerator.unwrap_model(trainer.model)
        width = max(map(len, self.ids))
        ids = np.stack([np.pad(ids, (width - len(ids), 0), constant_values=pad_token_id) for ids in self.ids])
        mask = np.stack([np.pad(np.ones_like(ids), (width - len(ids), 0)) for ids in self.ids])
        was_training = model.training
        model.eval()
        with trainer.compute_loss_context_manager():
            output = model.generate(
                input_ids=torch.from_numpy(ids).to(args.device),
                attention_mask=torch.from_numpy(mask).to(args.device),
                max_new_tokens=min(SAMPLED_TOKENS, self.longest - width),
                do_sample=False,
                pad_token_id=pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                lazy_mode=args.use_lazy_mode,
                ignore_eos=False,
            )
        model.train(was_training)
        return output[:, width:].tolist()

    def _decode(self, ids: Iterable[int]) -> str:
        return self.trainer.processing_class.decode(ids, skip_special_tokens=True).strip()


def find_prompts(rows: Iterable[Mapping], number: int, longest: int) -> list[list[int]]:
    """The first `number` prompts that leave room for an answer within `longest` tokens."""
    room = longest - min(SAMPLED_TOKENS, longest // 2)
    fitting = (prompt for prompt in map(_find_prompt, rows) if len(prompt) <= room)
    found = list(itertools.islice(fitting, number))
    if len(found) < number:
        logger.warning(f"--sample_prompts {number}: {len(found)} held-out prompts have at most {room} tokens")
    return found


def _find_prompt(row: Mapping) -> list[int]:
    """What stands before the first token that is learnt; the beginning of a text without a prompt."""
    if "prompt_input_ids" in row:
        return list(row["prompt_input_ids"])
    ids, labels = row["input_ids"], row["labels"]
    start = next((place for place, label in enumerate(labels) if label != IGNORED), len(ids))
    return list(ids[: start if start > 1 else max(1, min(FIRST_TOKENS, len(ids) // 2))])
