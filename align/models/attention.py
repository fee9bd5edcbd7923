"""Masks that keep samples in one row apart, in the form each model family takes, and a probe that shows they hold.

Models differ in what they make of a 4-D mask, of a window and of padding, and some go wrong without an error. So
`families.py` says what was found to be right, and the probe tries rows of the training on the loaded model itself.
"""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from align.errors import InputError, one_line
from align.models.families import FAMILIES, STATEFUL, WITH_A_LAST_POSITION, Family, find_context, find_window
from align.upstream_fixes import bound_masks, is_gaudi_class, unflatten_masks

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
    bound_masks(model)
    # Within autocast embeddings are float32, and a model fills its mask with the lowest number of their type.
    dtype = torch.float32 if torch.is_autocast_enabled(segment_ids.device.type) else model.dtype
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, visible = inner.config.get_text_config(), find_visible(segment_ids, branch_ids)
    family = FAMILIES.get(config.model_type, Family())
    if is_gaudi_class(type(inner)) and not family.additive:  # which gets no text longer than its window
        if family.flattened:
            unflatten_masks(model)
        return visible[:, None].to(dtype)
    near, window = visible, find_window(config)
    if window is not None:
        near = visible & (position_ids[:, :, None] - position_ids[:, None, :] < window)
    if getattr(config, "layer_types", None) is None:
        return _add_to_scores(near, dtype)
    return {
        "full_attention": _add_to_scores(visible, dtype),
        "sliding_attention": _add_to_scores(near, dtype),
    }


def _add_to_scores(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where a token attends, elsewhere a number that stays finite where autocast makes it bfloat16."""
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min)
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, lowest)[:, None]


# ---------------------------------------------------------------- the probe

# How much of a token's logits rounding may change, by dtype. A mask that leaks changes more than half of them.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)  # of a model's code
COMPARED = 128  # tokens of a sample, evenly spaced: logits of all would fill the memory
TRIED = 2  # samples of the row, the longest ones


@dataclass(frozen=True)
class ProbeResult:
    """Differences are relative: the largest norm of a token's change in logits by the norm of its logits."""

    earlier_moved: float  # by later tokens that changed, in a sample alone
    row_differs: float  # from its samples alone; infinite if the model refuses the row


def find_samples(row: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The columns of each sample of a row (ids `[T]`) in the order of its tokens; a branch is one with its prompt."""
    if "segment_ids" not in row:
        return [row["attention_mask"].nonzero()[:, 0]]
    segment_ids, branch_ids = row["segment_ids"], row.get("branch_ids", torch.zeros_like(row["segment_ids"]))
    samples = []
    for segment in range(1, int(segment_ids.max()) + 1):
        own = segment_ids == segment
        for branch in sorted(set(branch_ids[own].tolist()) - {0}) or [0]:
            columns = (own & ((branch_ids == 0) | (branch_ids == branch))).nonzero()[:, 0]
            samples.append(columns[row["position_ids"][columns].argsort()])
    return samples


@torch.no_grad()
def probe(
    model: PreTrainedModel, row: Mapping[str, torch.Tensor], device: torch.device, autocast: bool = False, **inputs
) -> ProbeResult:
    """Measures on the loaded model whether a token sees later ones, and whether samples of a row are as if alone.

    `row` has the ids `[T]` of a collated row: `input_ids` with `attention_mask`, or with `position_ids`, `segment_ids`
    and maybe `branch_ids`. `inputs` are the further inputs that training passes, `autocast` whether it computes in
    bfloat16. Under ZeRO-3 every rank calls it, before DeepSpeed's engine exists, which gathers layer by layer.
    """
    tokens = row["input_ids"]
    samples = sorted(find_samples(row), key=len, reverse=True)[:TRIED]

    def compute_logits(ids: torch.Tensor, compared: torch.Tensor, **row_inputs) -> torch.Tensor:
        with gathered(model), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            output = model(input_ids=ids[None].to(device), use_cache=False, **row_inputs, **inputs)
        return output.logits[0, compared.to(device)].float().cpu()

    def compute_alone(ids: torch.Tensor, compared: torch.Tensor) -> torch.Tensor:
        return compute_logits(ids, compared, attention_mask=torch.ones_like(ids)[None].to(device))

    was_training = model.training
    model.eval()  # no dropout
    compared = [torch.linspace(0, len(columns) - 1, min(COMPARED, len(columns))).long() for columns in samples]
    alone = [compute_alone(tokens[columns], places) for columns, places in zip(samples, compared, strict=True)]
    changed, half = tokens[samples[0]].clone(), len(samples[0]) // 2
    changed[half:] = changed[half:].flip(0) + 1
    changed[half:] %= model.config.get_text_config().vocab_size
    earlier = compared[0] < half
    earlier_moved = largest_change(alone[0][earlier], compute_alone(changed, compared[0])[earlier])
    columns = torch.cat([columns[places] for columns, places in zip(samples, compared, strict=True)])
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        row_inputs = _row_inputs(model, row, device)
    try:
        in_row = compute_logits(tokens, columns, **row_inputs)
        row_differs = largest_change(torch.cat(alone), in_row)
    except REFUSALS as error:  # many know no 4-D mask
        logger.debug(f"the probed row: {error}")
        row_differs = math.inf
    model.train(was_training)
    return ProbeResult(earlier_moved, row_differs)


def _row_inputs(model: PreTrainedModel, row: Mapping[str, torch.Tensor], device: torch.device) -> dict:
    """What the model takes of a row beside its tokens, as the trainers give it."""
    if "segment_ids" not in row:
        return {"attention_mask": row["attention_mask"][None].to(device)}
    ids = {name: row[name][None].to(device) for name in ("segment_ids", "position_ids", "branch_ids") if name in row}
    return {"attention_mask": segment_mask(model, **ids), "position_ids": ids["position_ids"]}


def check_context(config: PretrainedConfig, longest: int, flag: str = "--model_name_or_path") -> None:
    """Refuses texts of `longest` tokens that the model, which `flag` has named, has no positions for, or tells them."""
    name, context = config.model_type, find_context(config)
    if context is not None and longest > context:
        beyond = f"texts of the data have up to {longest} tokens, and this {name} model knows {context} (config.json)"
        if name in WITH_A_LAST_POSITION:
            raise InputError(f"{flag}: {beyond}; give a smaller limit of length, or another model")
        logger.warning(f"{beyond}: it may fail on longer ones")


def probe_rows(
    model: PreTrainedModel,
    row: Mapping[str, torch.Tensor],
    device: torch.device,
    autocast: bool = False,
    flag: str = "--model_name_or_path",
    **inputs,
) -> bool:
    """Whether rows like this one, as in `probe`, may share a mask; says why not.

    Raises `InputError` where the model, which `flag` has named, is not causal, or where padding behind a sample changes
    it. Moves the model to `device`, as the trainer does.
    """
    place(model, device)
    name, config = model.config.model_type, model.config
    try:
        result = probe(model, row, device, autocast, **inputs)
    except REFUSALS as error:
        way = "without --bf16, or with --deepspeed" if autocast else "with another --attn_implementation"
        reason = one_line(error)
        raise InputError(f"{flag}: this {name} model stops as it would be trained ({reason}); try it {way}") from error
    tolerance = TOLERANCE[torch.bfloat16 if autocast else model.dtype]
    if math.isnan(result.earlier_moved):
        raise InputError(
            f"{flag}: this {name} model gives values that are not finite for a row of the data; its weights are "
            "damaged, or its numbers too large for this type (try without, or with, --bf16)"
        )
    if result.earlier_moved > tolerance:
        raise InputError(
            f"--attn_implementation {config._attn_implementation}: tokens of this {name} model see later ones (their "
            f"logits moved by {result.earlier_moved:.2g}); try --attn_implementation eager"
        )
    shares = "segment_ids" in row
    if result.row_differs <= tolerance and not (shares and config.model_type in STATEFUL):  # a short one may hide it
        return True
    if not shares:
        raise InputError(
            f"{flag}: padding changes what this {name} model says (logits moved by {result.row_differs:.2g}), so that "
            "it cannot be trained in batches; choose another model"
        )
    if "branch_ids" in row:
        logger.warning(f"answers of this {name} model cannot share a prompt; each gets a padded row")
    else:
        logger.warning(f"this {name} model cannot keep samples in one row apart; they get rows of their own")
    return False


def may_skip_probe(model: PreTrainedModel, asked: bool) -> bool:
    """Whether a probe that is not asked for can be left out; says why not."""
    is_stateful = model.config.model_type in STATEFUL
    if asked and is_stateful:
        logger.warning(f"{model.config.model_type} models are probed all the same: they carry a state along a row")
    return asked and not is_stateful


def place(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Moves the model to its card, as the trainer does; under ZeRO-3 it is there."""
    if not _is_partitioned(model):
        model.to(device).tie_weights()
    return model


def largest_change(before: torch.Tensor, after: torch.Tensor) -> float:
    """Of logits `[..., vocabulary]`; a constant added to all logits of a token changes nothing."""
    before, after = (logits - logits.mean(-1, keepdim=True) for logits in (before, after))
    change, size = (torch.linalg.vector_norm(logits, dim=-1) for logits in (after - before, before))
    relative = (change / size).where(change != 0, 0.0)  # logits that are all alike have a size of 0
    return relative.max().item() if len(size) else 0.0


def _is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 holds the parameters."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gathers ZeRO-3's partitions of each layer while it runs; before DeepSpeed's engine exists, nothing else does."""
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
