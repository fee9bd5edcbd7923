"""How to decode: the user's flags on top of the model's own generation config."""

import inspect
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import InputError
from align.generation.decoding import TextGenerator
from align.generation.model import SWITCH
from align.generation.stepping import ForwardOptions, has_static_shapes, takes_cache
from align.merge.checkpoints import read_json

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class DecodingArguments:
    _argument_group_name = "Decoding"

    max_new_tokens: int = field(default=100, metadata={"help": "Longest answer in tokens."})
    stop_tokens: list[str] = field(
        default_factory=list, metadata={"help": "Tokens that end a text besides the model's own end tokens."}
    )
    do_sample: bool = field(default=False, metadata={"help": "Sample instead of taking the likeliest token."})
    ignore_eos: bool | None = field(
        default=None,
        metadata={"help": "Write on after end tokens, to --max_new_tokens (default: in a benchmark).", **SWITCH},
    )
    temperature: float | None = field(default=None, metadata={"help": "Temperature of --do_sample; 0 is greedy."})
    top_k: int | None = field(default=None, metadata={"help": "Sample among this many likeliest tokens."})
    top_p: float | None = field(default=None, metadata={"help": "Sample among the likeliest tokens of this mass."})
    num_beams: int = field(default=1, metadata={"help": "Beams of a beam search; 1 is none."})
    num_return_sequences: int = field(default=1, metadata={"help": "Answers to each prompt, with sampling or beams."})
    bad_words: list[str] = field(default_factory=list, metadata={"help": "Words that are never written."})
    repetition_penalty: float | None = field(
        default=None, metadata={"help": "Divides the logits of tokens that were said before; 1 is none."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of --do_sample."})


@dataclass
class GaudiArguments:
    _argument_group_name = "Gaudi"

    batch_size: int = field(default=1, metadata={"help": "Prompts generated together."})
    use_kv_cache: bool = field(default=True, metadata={"help": "Keep keys and values of earlier tokens."})
    use_hpu_graphs: bool = field(default=False, metadata={"help": "Record the model's forward as HPU graphs."})
    limit_hpu_graphs: bool = field(
        default=False, metadata={"help": "Leave the prompt's forward out of the HPU graphs, to save memory."}
    )
    reuse_cache: bool = field(
        default=False, metadata={"help": "Allocate the key/value cache once, inside the attention layers."}
    )
    bucket_size: int = field(
        default=-1, metadata={"help": "Grow the sequence by this many tokens at a time; -1 allocates all at once."}
    )
    bucket_internal: bool = field(
        default=False, metadata={"help": "Grow what attention sees of the key/value cache by --bucket_size."}
    )
    attn_softmax_bf16: bool = field(default=False, metadata={"help": "Under --bf16, softmax in bfloat16 as well."})
    attn_batch_split: int = field(
        default=1,
        metadata={"help": "Cut a batch of prompts into parts: cards compute one while they exchange another (llama)."},
    )
    use_flash_attention: bool = field(default=False, metadata={"help": "Use flash attention for the prompt."})
    flash_attention_recompute: bool = field(
        default=False, metadata={"help": "Use flash attention's recompute mode, to save memory on long prompts."}
    )
    flash_attention_causal_mask: bool = field(
        default=False,
        metadata={"help": "Flash attention without a mask, where the prompts of a batch are equally long."},
    )
    flash_attention_fast_softmax: bool = field(default=False, metadata={"help": "Flash attention's fast softmax."})


# How attention is computed; arguments of the models that have the choice
FLASH: tuple[str, ...] = ("use_flash_attention", "flash_attention_recompute", "flash_attention_causal_mask")
FLASH += ("flash_attention_fast_softmax",)
KERNELS: tuple[str, ...] = (*FLASH, "attn_softmax_bf16", "attn_batch_split")
# Fields of a generation_config.json that texts follow
USED = tuple(
    """temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff renormalize_logits repetition_penalty
    no_repeat_ngram_size bad_words_ids sequence_bias suppress_tokens begin_suppress_tokens min_length min_new_tokens
    forced_eos_token_id stop_strings remove_invalid_values length_penalty early_stopping""".split()
)
# Fields that flags and folders decide instead
REPLACED = tuple(
    """max_length max_new_tokens do_sample use_cache bos_token_id eos_token_id pad_token_id transformers_version
    _from_model_config""".split()
)


def _is_number(value: Any, least: float, most: float = math.inf) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and least <= value <= most


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and all(word and _are_tokens(word) for word in value)


def _are_biases(value: Any) -> bool:
    pairs = value if isinstance(value, list) else list(value.items()) if isinstance(value, dict) else [None]
    return all(
        isinstance(pair, (list, tuple))
        and len(pair) == 2
        and isinstance(pair[0], (list, tuple))
        and _are_words([list(pair[0])])
        and _is_number(pair[1], -math.inf)
        for pair in pairs
    )


SHARE = "a number from 0 to 1", lambda value: _is_number(value, 0, 1)
AT_LEAST_0 = "a number, 0 or more", lambda value: _is_number(value, 0)
COUNT = "a whole number, 0 or more", lambda value: type(value) is int and value >= 0
TOKENS = "a list of tokens' numbers", _are_tokens
ENDS = "a token's number, or several", lambda value: _are_tokens(value if isinstance(value, list) else [value])
# What the fields of a generation_config.json must be where they are given: a sentence's end, and a test
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"), SHARE),
    **dict.fromkeys(("top_k", "no_repeat_ngram_size", "min_length", "min_new_tokens"), COUNT),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), TOKENS),
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id"), ENDS),
    "temperature": AT_LEAST_0,
    "repetition_penalty": ("a number above 0", lambda value: _is_number(value, 1e-9)),
    "length_penalty": ("a number", lambda value: _is_number(value, -math.inf)),
    "bad_words_ids": ("lists of tokens' numbers, none empty", _are_words),
    "sequence_bias": ("pairs of tokens' numbers and a bias", _are_biases),
    "stop_strings": (
        "text, or several that are not empty",
        lambda value: all(text and isinstance(text, str) for text in (value if isinstance(value, list) else [value])),
    ),
}


def check_fields(model: "PreTrainedModel") -> None:
    """Refuses values of the model's own generation config that no text can follow."""
    for name, value in model.generation_config.to_dict().items():
        if value is not None and name in KINDS and not KINDS[name][1](value):
            raise InputError(
                f"--model_name_or_path: generation_config.json of {model.name_or_path}: {name} is "
                f"{repr(value)[:40]}, not {KINDS[name][0]}; mend that entry, or take it out"
            )
    forced, size = model.generation_config.forced_eos_token_id, model.config.get_text_config().vocab_size
    if forced is not None and max(forced if isinstance(forced, list) else [forced], default=size) >= size:
        raise InputError(
            f"--model_name_or_path: generation_config.json of {model.name_or_path}: forced_eos_token_id is {forced}, "
            f"and this model's tokens are 0 to {size - 1}; mend that entry, or take it out"
        )
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        if len(set(getattr(model.generation_config, name) or ()).intersection(range(size))) == size:
            raise InputError(
                f"--model_name_or_path: generation_config.json of {model.name_or_path}: {name} leaves no token to say; "
                "mend that entry, or take it out"
            )


def find_stop_tokens(tokens: list[str], tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Ids of the end tokens that the user names."""
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise InputError(f"--stop_tokens: {token!r} is not one token of this tokenizer")
    return {vocabulary[token] for token in tokens}


def find_end_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", stop_tokens: set[int]) -> list[int]:
    """All tokens that end a text: the model's, the tokenizer's and the user's."""
    own = model.generation_config.eos_token_id
    return sorted(stop_tokens.union(own if isinstance(own, list) else [own], [tokenizer.eos_token_id]) - {None})


def fit_to_class(model: "PreTrainedModel", gaudi: GaudiArguments) -> GaudiArguments:
    """Leaves out, with a warning, flags that the model's class has nothing for. They change speed and memory alone."""
    from align.models.families import can_reuse_cache, find_flash_fault

    kind = f"{model.config.model_type} models"
    if gaudi.use_kv_cache and not takes_cache(model):
        logger.warning(f"{kind} have no usable cache: each token computes all tokens before it again")
        gaudi = replace(gaudi, use_kv_cache=False)
    if not has_static_shapes(model):
        gaudi = _leave_out(
            gaudi, ("reuse_cache", "bucket_size", "bucket_internal"), f"{kind} run without static shapes"
        )
    elif not can_reuse_cache(model):
        gaudi = _leave_out(gaudi, ("reuse_cache",), f"optimum-habana has none for {kind}")
    if fault := find_flash_fault(model):
        gaudi = _leave_out(gaudi, FLASH, f"optimum-habana's leaves out {fault} in {kind}")
    return gaudi


def _leave_out(gaudi: GaudiArguments, names: tuple[str, ...], why: str) -> GaudiArguments:
    defaults = {name: getattr(GaudiArguments, name) for name in names}
    given = [f"--{name}" for name, default in defaults.items() if getattr(gaudi, name) != default]
    if given:
        logger.warning(f"{', '.join(given)} {'has' if len(given) == 1 else 'have'} no effect: {why}.")
    return replace(gaudi, **defaults)


def choose_kernels(model: "PreTrainedModel", gaudi: GaudiArguments, world_size: int = 1) -> dict[str, bool | int]:
    """Those of `KERNELS` that this model has; a warning names each other that was asked for."""
    import torch

    kind = model.config.model_type
    chosen = {}
    known = inspect.signature(type(model).forward).parameters
    for flag in KERNELS:
        if getattr(gaudi, flag) == getattr(GaudiArguments, flag):
            continue
        if flag not in known:
            logger.warning(f"--{flag} has no effect: optimum-habana's {kind} models have none.")
        elif flag == "attn_softmax_bf16" and model.dtype != torch.bfloat16:
            logger.warning("--attn_softmax_bf16 has no effect in float32; add --bf16.")
        elif flag == "attn_batch_split" and world_size == 1:
            logger.warning("--attn_batch_split has no effect on one card: it hides the exchange between several.")
        else:
            chosen[flag] = getattr(gaudi, flag)
    return chosen


def make_generation_config(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    decoding: DecodingArguments,
    end_tokens: list[int],
) -> "GenerationConfig":
    """What the user asked for, on top of the model's own generation config, as far as its fields are `USED`.

    A warning names other fields that say something.
    """
    from transformers import GenerationConfig

    path, neutral = Path(model.name_or_path) / "generation_config.json", GenerationConfig().to_dict()
    own = (read_json(path) if path.is_file() else {}) | model.generation_config.to_dict()  # which forgets some
    unused = [name for name, value in own.items() if name not in USED + REPLACED and value != neutral.get(name)]
    if unused:
        have = "has" if len(unused) == 1 else "have"
        logger.warning(f"The model's generation_config.json: {', '.join(sorted(unused))} {have} no effect here.")
    config = {name: own[name] for name in USED if own.get(name) is not None}
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, *end_tokens)  # masked, so any token will do
    samples = decoding.do_sample
    if samples and decoding.temperature is None and config.get("temperature") == 0:
        logger.warning("The model's generation_config.json: a temperature of 0 is greedy; --temperature 1 samples.")
        samples = False
    samples = samples and decoding.temperature != 0
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        if (value := getattr(decoding, name)) is not None and (samples or name == "repetition_penalty"):
            config[name] = value
    if decoding.bad_words:
        config["bad_words_ids"] = config.get("bad_words_ids", []) + find_bad_words(decoding.bad_words, tokenizer)
    config |= {
        "max_new_tokens": decoding.max_new_tokens,
        "num_beams": decoding.num_beams,
        "num_return_sequences": decoding.num_return_sequences,
        "do_sample": samples,
        "pad_token_id": next((pad for pad in pads if pad is not None and pad < model.config.vocab_size), 0),
    }
    made = GenerationConfig()
    for name, value in config.items():  # its constructor refuses fields that greedy texts do not read
        setattr(made, name, value)
    return made


def find_bad_words(words: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Ids of each word, alone and after a blank."""
    ids = [tokenizer(form + word, add_special_tokens=False).input_ids for word in words for form in ("", " ")]
    return [list(each) for each in dict.fromkeys(map(tuple, ids)) if each]


def make_generator(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    decoding: DecodingArguments,
    gaudi: GaudiArguments,
    stop_tokens: set[int],
    rows: int = 1,
    longest: int = 0,
    world_size: int = 1,
    goes_on: bool = False,
) -> TextGenerator:
    """What generates as the flags say; a text that `goes_on` has no end. Prompts have `longest` tokens at most."""
    check_fields(model)
    gaudi = fit_to_class(model, gaudi)
    end_tokens = [] if goes_on else find_end_tokens(model, tokenizer, stop_tokens)
    kernels = choose_kernels(model, gaudi, world_size)
    config = make_generation_config(model, tokenizer, decoding, end_tokens)
    if goes_on:
        config.stop_strings = None
    return TextGenerator(
        model, tokenizer, config, make_forward_options(gaudi, kernels), end_tokens, rows=rows, longest=longest
    )


def make_forward_options(gaudi: GaudiArguments, kernels: dict[str, bool | int]) -> ForwardOptions:
    return ForwardOptions(
        use_cache=gaudi.use_kv_cache,
        reuse_cache=gaudi.reuse_cache,
        bucket_size=gaudi.bucket_size,
        use_hpu_graphs=gaudi.use_hpu_graphs,
        limit_hpu_graphs=gaudi.limit_hpu_graphs,
        inputs={flag: getattr(GaudiArguments, flag) for flag in KERNELS} | {"decode_attn_batch_split": 1} | kernels,
    )
