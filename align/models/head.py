"""The two ends of a language model where the vocabulary is: log-probs without whole logits, and a lighter embedding.

Logits are most of a step's memory where the vocabulary is large: 2 x 1,024 tokens of a Llama-3 take 1 GiB in float32,
and a plain loss keeps several copies of them. Here the head computes a block of tokens at a time and keeps what the
gradient needs: one vector of the hidden size for each token.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from align.errors import one_line
from align.models.attention import compute_dtype, gathered, place

logger = logging.getLogger(__name__)

BLOCK = 128  # tokens whose logits are there at once
# Settings by which models change logits after the head, with their values that change nothing
CHANGES = {"final_logit_softcapping": (None, 0), "logit_scale": (None, 1), "logits_scaling": (None, 1)}
CHANGES |= {"lm_head_multiplier": (None, 1)}
IGNORED = -100


class TokenScores(torch.autograd.Function):
    """Log-probs of `targets` [tokens], and the means of their logits, from `hidden` [tokens, hidden size].

    The head is `weight` [vocabulary, hidden size] and `bias` [vocabulary] or None. The log-prob of target t is
    z_t - logsumexp(z) with z = W h + b, its gradient W_t - softmax(z) W: the second factor of the chain rule, which
    does not depend on the loss. So it is computed here, block by block, and kept in place of the logits. Only a weight
    that is trained itself needs its logits once more, in backward. Results are float32 `[tokens]`.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        dtype = functional.linear(hidden[:1], weight[:1]).dtype  # the one that autocast, if there is one, asks for
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, cast = hidden.to(dtype), weight.to(dtype)
            log_probs, means, normalizers, slopes = [], [], [], []
            for block, target in zip(hidden.split(BLOCK), targets.split(BLOCK), strict=True):
                logits = _logits(block, cast, bias)
                normalizers.append(logits.logsumexp(-1))
                log_probs.append(logits.gather(-1, target[:, None])[:, 0] - normalizers[-1])
                means.append(logits.mean(-1))
                if ctx.needs_input_grad[0]:
                    slopes.append(_change(logits, normalizers[-1], target).to(dtype) @ cast)
        means = torch.cat(means)
        ctx.mark_non_differentiable(means)
        trained = (hidden, targets, torch.cat(normalizers)) if ctx.needs_input_grad[1] else ()
        ctx.save_for_backward(torch.cat(slopes) if slopes else None, *trained)
        ctx.weight, ctx.bias, ctx.dtype = (weight if trained else None), bias, dtype
        return torch.cat(log_probs), means

    @staticmethod
    def backward(ctx, change, _):
        slopes, *trained = ctx.saved_tensors
        for_hidden = None if slopes is None else (slopes * change[:, None]).to(slopes.dtype)
        for_weight = None
        if trained:
            cast = ctx.weight.to(ctx.dtype)
            for_weight = torch.zeros_like(cast, dtype=torch.float32)
            for block, target, normalizer, factor in zip(
                *(tensor.split(BLOCK) for tensor in (*trained, change)), strict=True
            ):
                factors = _change(_logits(block, cast, ctx.bias), normalizer, target) * factor[:, None]
                for_weight += (factors.to(ctx.dtype).T @ block).float()
            for_weight = for_weight.to(ctx.weight.dtype)
        return for_hidden, for_weight, None, None


def _logits(block: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return functional.linear(block, weight, None if bias is None else bias.to(weight.dtype)).float()


def _change(logits: torch.Tensor, normalizers: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """How log-probs change with their logits: 1 at the target, minus the probabilities. In place of the logits."""
    change = logits.sub_(normalizers[:, None]).exp_().neg_()
    return change.scatter_add_(-1, targets[:, None], torch.ones_like(targets[:, None], dtype=change.dtype))


class Head:
    """A model's output head, which gives scores of given tokens while it is asked to, else logits.

    It stays in its place in the model, so what wraps the model (PEFT, DDP, DeepSpeed's engine, which gathers ZeRO-3's
    partitions) sees the usual forward. The model's own loss is computed from the scores too.
    """

    def __init__(self, model: PreTrainedModel):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.module: nn.Linear = base.get_output_embeddings()
        self.targets: Any = None  # within `scoring`
        self.plain_loss = base.loss_function
        base.loss_function = self._loss

    @contextlib.contextmanager
    def scoring(self, targets: torch.Tensor) -> Iterator[None]:
        """Within, `logits` of the model's output are `[rows, columns, 2]`: log-probs of the targets, means of logits.

        `targets` `[rows, columns]` belong to the last columns of the row; IGNORED ones get some score.
        """
        self.targets, self.module.forward = targets, self._score
        try:
            yield
        finally:
            del self.module.forward
            self.targets = None

    def _score(self, hidden: torch.Tensor) -> torch.Tensor:
        columns = self.targets.shape[1]
        hidden = hidden[:, -columns:]
        targets = self.targets.clamp(min=0).flatten()
        scores = TokenScores.apply(hidden.flatten(0, 1), self.module.weight, self.module.bias, targets)
        return torch.stack(scores, -1).view(*self.targets.shape, 2)

    def _loss(self, logits, labels, vocab_size=None, num_items_in_batch=None, **kwargs):
        """transformers' ForCausalLMLoss; `labels` are those that the targets were made of."""
        if self.targets is None:
            return self.plain_loss(
                logits=logits, labels=labels, vocab_size=vocab_size, num_items_in_batch=num_items_in_batch, **kwargs
            )
        learnt = self.targets != IGNORED
        total = -torch.where(learnt, logits[..., 0], 0).sum()
        return total / (learnt.sum() if num_items_in_batch is None else num_items_in_batch)


def look_up_as_stored(model: PreTrainedModel) -> None:
    """Lets the embedding look tokens up in its own type, and cast what it found to the one that autocast asks for.

    Gaudi's autocast computes embeddings in float32 and casts the whole table for it: 2 GiB of a Llama-3 in bfloat16.
    """
    table = model.get_input_embeddings()
    if type(table) is not nn.Embedding or "forward" in vars(table):
        return
    look_up = table.forward

    def forward(ids: torch.Tensor) -> torch.Tensor:
        dtype = functional.embedding(torch.zeros_like(ids[:1, :1]), table.weight[:1]).dtype
        with torch.autocast(ids.device.type, enabled=False):
            return look_up(ids).to(dtype)

    table.forward = forward


def shift(labels: torch.Tensor) -> torch.Tensor:
    """The token that each position predicts, `[rows, columns]`; the last one predicts none."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def records_graphs(args) -> bool:
    """Whether optimum-habana wraps the model's forward into HPU graphs."""
    return args.use_lazy_mode and (args.use_hpu_graphs_for_training or args.use_hpu_graphs_for_inference)


def find_head(model: PreTrainedModel, device: torch.device, graphs: bool) -> Head | None:
    """The head of a model that can be scored in blocks; says why where logits stay whole. Moves the model to `device`.

    `graphs`: whether the forward is recorded as an HPU graph, which would keep the first batch's targets. A forward of
    eight tokens shows that the model returns the head's output as it is: soft caps and scales change it afterwards.
    Under ZeRO-3 every rank calls it, before DeepSpeed's engine exists. To be called within the trainer's autocast.
    """
    base = place(model.get_base_model() if hasattr(model, "get_base_model") else model, device)
    module = base.get_output_embeddings()
    if graphs:
        reason = "HPU graphs record the forward"
    elif type(module) is not nn.Linear:
        reason = f"the head is a {type(module).__name__}, not a plain linear layer"
    elif changed := [name for name, same in CHANGES.items() if getattr(base.config, name, None) not in same]:
        reason = f"the model's {changed[0]} changes them"
    elif module.bias is not None and module.bias.requires_grad:
        reason = "the head trains a bias"
    else:
        head = Head(model)
        reason = find_difference(model, head)
        if reason is None:
            return head
        base.loss_function = head.plain_loss
    logger.info(f"logits of whole rows are kept: {reason}")
    return None


@torch.no_grad()
def find_difference(model: PreTrainedModel, head: Head) -> str | None:
    ids = torch.arange(1, 9, device=head.module.weight.device)[None] % model.config.get_text_config().vocab_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "use_cache": False}
    was_training = model.training
    model.eval()
    with gathered(model):
        plain = model(**inputs)
    try:
        with gathered(model), head.scoring(shift(ids)):
            scored = model(**inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return f"the model computes with its logits itself ({one_line(error)})"
    finally:
        model.train(was_training)
    tolerance = 1e-4 if compute_dtype(model, ids.device) == torch.float32 else 5e-2
    with torch.autocast(ids.device.type, enabled=False):
        expected = plain.logits.float().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    if scored.logits.shape != (*ids.shape, 2):
        return "the model changes its logits"
    if not torch.allclose(scored.logits[:, :-1, 0].float(), expected, atol=tolerance, rtol=tolerance):
        return "the model changes its logits"
    if not torch.allclose(scored.loss.float(), plain.loss.float(), atol=tolerance, rtol=tolerance):
        return "the model has a loss of its own"
    return None
