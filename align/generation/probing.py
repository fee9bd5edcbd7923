"""Tries the loaded model with padding and cache before the first answer.

The prompts of one batch, padded as they will be, and two further tokens with the cache must give the logits that one
plain forward pass over the whole texts gives, without cache and padding. The table of families names known faults; this
finds others, on the model at hand.
"""

import gc
import logging

import torch

from align.errors import InputError, ResultError
from align.generation.config import (
    DecodingArguments,
    GaudiArguments,
    find_stop_tokens,
    make_generator,
)
from align.generation.decoding import TextGenerator
from align.generation.model import Source, load_model
from align.generation.prompts import Batch
from align.models.attention import REFUSALS, largest_change
from align.quiet import quiet_imports
from align.upstream_fixes import adapt_transformers, is_gaudi_class

logger = logging.getLogger(__name__)

STEPS = 2  # after the prompt
# How much of a token's logits rounding may change: in bfloat16, routers may choose another of two like experts.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
CHEAP = 256  # tokens: of wider prompts the narrowest are tried


def load_generator(
    source: Source,
    decoding: DecodingArguments,
    gaudi: GaudiArguments,
    encoded: list[list[int]],
    batches: list[Batch],
    longest: int = 0,
    world_size: int = 1,
    rank: int = 0,
    goes_on: bool = False,
) -> TextGenerator:
    """The model on its card and what generates as the flags say, tried with some of the prompts.

    No prompt will have more tokens than `longest`, or than these batches are wide; texts that go on do so after end
    tokens. Where optimum-habana's class fails, transformers' takes its place, on all ranks together; raises
    `ResultError` where that fails too.
    """
    stop_tokens = find_stop_tokens(decoding.stop_tokens, source.tokenizer)
    longest = longest or max(batch.width for batch in batches)
    with quiet_imports():  # the modules print which kernels they found
        adapt_transformers()

    def make(plain_class: bool) -> TextGenerator:
        model = load_model(
            source.folder,
            source.adapter,
            source.vocabulary_size,
            source.arguments,
            world_size,
            gaudi.use_hpu_graphs,
            longest=longest + decoding.max_new_tokens,
            rank=rank,
            plain_class=plain_class,
            flags=source.flags,
        )
        rows = min(gaudi.batch_size, len(encoded))
        return make_generator(model, source.tokenizer, decoding, gaudi, stop_tokens, rows, longest, world_size, goes_on)

    generator = make(False)
    if source.arguments.skip_probe:
        return generator
    prompts, width = choose_prompts(encoded, batches)
    fault = _find_on_all(generator, prompts, width, world_size)
    kind, is_gaudis = generator.model.config.model_type, is_gaudi_class(type(generator.model))
    if fault is not None and is_gaudis:
        logger.warning(f"{kind}: runs with transformers' own class, slower on a card, as optimum-habana's {fault}")
        del generator
        gc.collect()
        generator = make(True)
        fault = _find_on_all(generator, prompts, width, world_size)
    if fault is not None:
        raise ResultError(
            f"{source.flags.model}: this {kind} model {fault}; --use_kv_cache False with --batch_size 1 may be right, "
            "and --skip_probe has its answers all the same"
        )
    return generator


def _find_on_all(generator: TextGenerator, prompts: list[list[int]], width: int, world_size: int) -> str | None:
    """A fault where any rank has found one, as all must run the same class; an `InputError` of one ends all."""
    if world_size == 1:
        return find_fault(generator, prompts, width)
    fault, error = None, None
    try:
        fault = find_fault(generator, prompts, width)
    except InputError as raised:
        error = raised
    found = torch.tensor([fault is not None, error is not None], dtype=torch.int32, device="hpu")
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    is_wrong, ends = found.tolist()
    if ends:
        raise error or InputError("the probe of this model has ended on another card")
    return fault or ("is wrong on another card" if is_wrong else None)


def choose_prompts(encoded: list[list[int]], batches: list[Batch]) -> tuple[list[list[int]], int]:
    """The most padded prompt, the longest one beside it, and the width of their batch."""
    cheap = max(CHEAP, min(batch.width for batch in batches))

    def padding(batch: Batch) -> int:
        return batch.width - min(len(encoded[place]) for place in batch.places)

    batch = max((batch for batch in batches if batch.width <= cheap), key=padding)
    prompts = sorted((encoded[place] for place in batch.places), key=len)
    return prompts[:1] if len(prompts) == 1 else [prompts[0], prompts[-1]], batch.width


def find_fault(generator: TextGenerator, prompts: list[list[int]], width: int) -> str | None:
    """What is wrong with answers to these prompts, padded to `width`, in a few words; None where nothing is."""
    model = generator.model
    try:
        plain, seen = compute_both(generator, prompts, width)
    except REFUSALS as error:
        logger.debug("the probe", exc_info=True)
        return f"stops with an error ({type(error).__name__}: {' '.join(str(error).split())[:150]})"
    generator.refuse_nan(plain.isnan().any())
    change = largest_change(plain.nan_to_num(), seen.nan_to_num())  # which a generation config may ask for
    if change <= TOLERANCE[model.dtype]:
        return None
    return f"says something else with padding and cache than without (logits moved by {change:.2g})"


@torch.inference_mode()
def compute_both(
    generator: TextGenerator, prompts: list[list[int]], width: int
) -> tuple[torch.FloatTensor, torch.FloatTensor]:
    """Logits `[texts, steps + 1, vocabulary]` behind the prompts: in a plain forward pass, and as generated.

    A text is a prompt with its likeliest tokens. With beams there are two of each, one with second choices, which
    change places as beams do.
    """
    copies = generator.copies
    texts = generator.lay_out(prompts, width)
    seen = [generator.forward(texts, 0).clone()]  # a replayed graph writes to the same place again
    every = torch.arange(len(seen[0]), device=texts.tokens.device)
    exchanged = every.view(-1, copies).flip(1).flatten()
    for step in range(1, min(STEPS, generator.config.max_new_tokens - 1) + 1):
        choices = seen[-1].topk(2).indices
        tokens = choices.gather(1, (every % copies % 2)[:, None]).squeeze(1)
        if generator.config.num_beams > 1:
            seen, tokens = [logits[exchanged] for logits in seen], tokens[exchanged]
            texts.select(exchanged)
            generator.stepper.select(exchanged)
        texts.append(tokens)
        seen.append(generator.forward(texts, step).clone())
    rows = [prompt * copies + copy for prompt in range(len(prompts)) for copy in range(min(2, copies))]
    whole = [texts.tokens[row, : texts.length][texts.mask[row, : texts.length] == 1] for row in rows]
    return _compute_plain(generator, whole, len(seen)), torch.stack([logits[rows] for logits in seen], 1).cpu()


def _compute_plain(generator: TextGenerator, whole: list[torch.LongTensor], number: int) -> torch.FloatTensor:
    """The last `number` logits of each text, which stand side by side, padded at the end, where no token sees it."""
    ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
    graphs = {"bypass_hpu_graphs": True} if generator.options.use_hpu_graphs else {}
    logits = generator.model(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, return_dict=True, **graphs
    ).logits
    ends = [(row, len(text)) for row, text in enumerate(whole)]
    return torch.stack([logits[row, end - number : end] for row, end in ends]).float().cpu()
