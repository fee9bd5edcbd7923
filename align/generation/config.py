"""How to decode: the user's flags on top of the model's own generation config."""

import copy
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from align.errors import InputError

if TYPE_CHECKING:
    from optimum.habana.transformers.generation import GaudiGenerationConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class DecodingArguments:
    max_new_tokens: int = field(default=100, metadata={"help": "Longest answer in tokens."})
    stop_tokens: list[str] = field(
        default_factory=list, metadata={"help": "Tokens that end a text besides the model's own end tokens."}
    )
    do_sample: bool = field(default=False, metadata={"help": "Sample instead of taking the likeliest token."})
    temperature: float | None = field(default=None, metadata={"help": "Temperature of --do_sample, above 0."})
    top_k: int | None = field(default=None, metadata={"help": "Sample among this many likeliest tokens."})
    top_p: float | None = field(default=None, metadata={"help": "Sample among the likeliest tokens of this mass."})
    num_beams: int = field(default=1, metadata={"help": "Beams of a beam search; 1 is none."})
    repetition_penalty: float | None = field(
        default=None, metadata={"help": "Divides the logits of tokens that were said before; 1 is none."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of --do_sample."})


@dataclass
class GaudiArguments:
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
    use_flash_attention: bool = field(default=False, metadata={"help": "Use flash attention for the prompt."})
    flash_attention_recompute: bool = field(
        default=False, metadata={"help": "Use flash attention's recompute mode, to save memory on long prompts."}
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


def has_static_shapes(model: "PreTrainedModel") -> bool:
    """Whether the model takes the place of the next token as a tensor, in sequences padded to their final length."""
    return "token_idx" in inspect.signature(type(model).forward).parameters


def check_support(model: "PreTrainedModel", gaudi: GaudiArguments) -> None:
    """What optimum-habana can do with some models only."""
    kind = model.config.model_type
    if gaudi.reuse_cache and not hasattr(model, "allocate_kv_cache"):
        raise InputError(f"--reuse_cache: optimum-habana has none for {kind} models; leave it out")
    if gaudi.bucket_size > 0 and not has_static_shapes(model):
        raise InputError(f"--bucket_size: optimum-habana has no static shapes for {kind} models; leave it out")


def make_generation_config(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    decoding: DecodingArguments,
    gaudi: GaudiArguments,
    end_tokens: list[int],
) -> "GaudiGenerationConfig":
    """The model's own generation config, with what the user asked for on top; `model` gets it as its own."""
    config = copy.deepcopy(model.generation_config)
    beams = decoding.num_beams > 1
    # Its beam search on static shapes knows one end token and puts any finished beam first (utils.py:3175).
    static_shapes = not beams and has_static_shapes(model)
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, *end_tokens)  # masked, so any token will do
    sampling = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
    if decoding.do_sample:
        sampling = {key: value for key in sampling if (value := getattr(decoding, key)) is not None}
    config.update(
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.num_beams,
        do_sample=decoding.do_sample,
        **sampling,
        repetition_penalty=1.0,  # RepetitionPenalty does it
        pad_token_id=next((pad for pad in pads if pad is not None and pad < model.config.vocab_size), 0),
        eos_token_id=(end_tokens or None) if beams else None,  # EndWatch looks for them
        ignore_eos=True,
        static_shapes=static_shapes,
        use_cache=gaudi.use_kv_cache,
        trim_logits=gaudi.use_kv_cache and static_shapes,  # the head sees the last position of a prompt alone
        reuse_cache=gaudi.reuse_cache,
        bucket_size=gaudi.bucket_size,
        limit_hpu_graphs=gaudi.limit_hpu_graphs,
        use_flash_attention=gaudi.use_flash_attention,
        flash_attention_recompute=gaudi.flash_attention_recompute,
    )
    model.generation_config = config  # where generate() looks for tokens that its own config leaves out
    return config
