"""Masks that keep samples in one row apart, in the form each model family takes, and a probe that shows they hold.

optimum-habana's models differ in what they make of a 4-D mask, and some go wrong without an error: Mixtral's default
attention is not even causal when nothing is padded. So `families.py` says what was found to be exact, and the probe
tests the loaded model, whatever it is, before it is trained.
"""

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from align.errors import InputError
from align.models.families import FAMILIES, Family, choose_attn_implementation
from align.upstream_fixes import bound_masks, unflatten_masks

logger = logging.getLogger(__name__)


def find_visible(segment_ids: torch.Tensor, branch_ids: torch.Tensor | None = None) -> torch.Tensor:
    """Who sees whom, `[batch, T, T]` (query, key), from ids `[batch, T]`: earlier tokens of one's own segment.

    A segment may branch: its tokens of branch 0 (a shared prompt) are seen by all that follow, those of other branches
    (two answers to it) by their own branch alone. Padding is a segment too, so that no token is left without a key.
    """
    columns = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    visible = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (columns[:, None] >= columns)
    if branch_ids is None:
        return visible
    return visible & ((branch_ids[:, None, :] == 0) | (branch_ids[:, :, None] == branch_ids[:, None, :]))


def compute_dtype(model: PreTrainedModel, device: torch.device) -> torch.dtype:
    """What the model's matrices are multiplied in: autocast's type, or its own."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.dtype


def segment_mask(
    model: PreTrainedModel,
    segment_ids: torch.Tensor,
    position_ids: torch.Tensor,
    branch_ids: torch.Tensor | None = None,
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The `attention_mask` of packed rows, `[batch, 1, T, T]` from ids `[batch, T]`, in the form that `model` takes.

    Built on the ids' device: static shapes, nothing read back. A window counts positions, as answers may share a row.
    `model` may be wrapped by PEFT. The attention of a family that flattens masks gets a hook the first time.
    """
    family, config = _find_family(model), model.config
    if family.flattened:
        unflatten_masks(model)
    bound_masks(model)
    visible = near = find_visible(segment_ids, branch_ids)
    if family.window_margin is not None and config.sliding_window is not None:
        distance = position_ids[:, :, None] - position_ids[:, None, :]
        near = visible & (distance < config.sliding_window + family.window_margin)
    # Within autocast embeddings are float32, and a model fills its mask with the lowest number of their type.
    dtype = torch.float32 if torch.is_autocast_enabled(segment_ids.device.type) else model.dtype
    visible, near = (_form(who, family, dtype) for who in (visible, near))
    return {"full_attention": visible, "sliding_attention": near} if family.by_layer_type else near


def _find_family(model: PreTrainedModel) -> Family:
    """Where nobody tried the family: optimum-habana's own classes share one form of mask, transformers' another."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    is_gaudi = type(inner).__module__.startswith("optimum.habana")
    return FAMILIES.get(inner.config.model_type, Family(additive=not is_gaudi))


def _form(visible: torch.Tensor, family: Family, dtype: torch.dtype) -> torch.Tensor:
    mask = visible[:, None].to(dtype)
    if not family.additive:
        return mask
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min)  # float32's is -inf in bfloat16
    return torch.zeros_like(mask).masked_fill(~visible[:, None], lowest)


# How much of a token's logits rounding may change, by dtype. A mask that leaks changes more than half of them.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class ProbeResult:
    """Differences are relative: the largest norm of a token's change in logits by the norm of its logits."""

    earlier_moved: float  # by later tokens that changed, samples alone
    packed_differs: float  # from the samples alone; infinite if the model refuses the mask
    causal: bool
    packable: bool


@torch.no_grad()
def probe(model: PreTrainedModel, device: torch.device, **model_inputs) -> ProbeResult:
    """Measures on the loaded model whether a token sees a later one, or a packed sample another.

    Two forward passes over a few dozen tokens in all. `model_inputs` are the further inputs that training passes. To be
    called within the trainer's autocast.
    Under ZeRO-3 every rank calls it, before DeepSpeed's engine exists; parameters are gathered layer by layer.
    """
    length, half = 8, 4
    tokens = np.random.default_rng(0).integers(0, model.config.get_text_config().vocab_size, (3, length))
    first, second, changed = tokens
    changed[:half] = first[:half]
    alone = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    packed = {
        "input_ids": np.stack([np.concatenate([first, second]), np.concatenate([changed, second])]),
        "position_ids": np.tile(np.arange(length), (2, 2)),
        "segment_ids": np.tile(np.repeat([1, 2], length), (2, 1)),
    }
    alone, packed = (
        {name: torch.from_numpy(ids).to(device) for name, ids in inputs.items()} for inputs in (alone, packed)
    )
    packed["attention_mask"] = segment_mask(model, packed.pop("segment_ids"), packed["position_ids"])

    def compute_logits(inputs: dict) -> torch.Tensor:
        with gathered(model):
            return model(**inputs, use_cache=False, **model_inputs).logits.float().cpu()

    was_training = model.training
    model.eval()  # no dropout
    alone = compute_logits(alone)
    earlier_moved = _largest_change(alone[0, :half], alone[2, :half])
    expected = torch.stack([torch.cat([alone[0], alone[1]]), torch.cat([alone[2], alone[1]])])
    try:
        packed_differs = _largest_change(expected, compute_logits(packed))
    except (RuntimeError, TypeError, ValueError) as error:  # many models know no 4-D mask
        logger.info(f"packing: {error}")
        packed_differs = math.inf
    model.train(was_training)
    tolerance = TOLERANCE[compute_dtype(model, device)]
    return ProbeResult(earlier_moved, packed_differs, earlier_moved <= tolerance, packed_differs <= tolerance)


def probe_packing(model: PreTrainedModel, row_length: int, device: torch.device, **model_inputs) -> bool:
    """Whether rows of `row_length` may hold several samples; says why not. Raises `InputError` if not even causal.

    Moves the model to `device`, as the trainer does. `model_inputs` as for `probe`.
    """
    place(model, device)
    name, config = model.config.model_type, model.config
    result = probe(model, device, **model_inputs)
    if not result.causal:
        right = choose_attn_implementation(config) or "eager"
        raise InputError(
            f"--attn_implementation {config._attn_implementation}: tokens of this {name} model see later ones (their "
            f"logits moved by {result.earlier_moved:.2g}); try --attn_implementation {right}"
        )
    if not result.packable:
        logger.warning(f"packing: this {name} model cannot keep samples in one row apart; they get rows of their own")
        return False
    window = getattr(config, "sliding_window", None)
    if name not in FAMILIES and window is not None and row_length > window:
        logger.warning(
            f"packing: nobody tried how {name} models apply their window of {window} tokens; samples get rows of "
            "their own"
        )
        return False
    return True


def place(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Moves the model to its card, as the trainer does; under ZeRO-3 it is there."""
    if not _is_partitioned(model):
        model.to(device).tie_weights()
    return model


def _largest_change(before: torch.Tensor, after: torch.Tensor) -> float:
    """Of logits `[..., vocabulary]`; a constant added to all logits of a token changes nothing."""
    before, after = (logits - logits.mean(-1, keepdim=True) for logits in (before, after))
    change, size = (torch.linalg.vector_norm(logits, dim=-1) for logits in (after - before, before))
    return (change / size).max().item()


def _is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 holds the parameters."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gathers ZeRO-3's partitions of each layer while it runs: nothing else does before DeepSpeed's engine exists."""
    if not _is_partitioned(model):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    open_layers: dict[nn.Module, contextlib.AbstractContextManager] = {}

    def gather(layer: nn.Module, _) -> None:
        open_layers[layer] = GatheredParameters(list(layer.parameters()))
        open_layers[layer].__enter__()

    def release(layer: nn.Module, *_) -> None:
        open_layers.pop(layer).__exit__(None, None, None)

    hooks = []
    for layer in _find_layers(model):
        hooks += [layer.register_forward_pre_hook(gather), layer.register_forward_hook(release)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in list(open_layers):  # an error came before their release
            release(layer)


def _find_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks in lists of blocks, each as a whole, and what stands beside the lists (embeddings, norm, head)."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif any(isinstance(inner, nn.ModuleList) for inner in child.modules()):
            yield from _find_layers(child)
        else:
            yield child
