"""The table of model families: what was found to be right with each, and what is done where it was not.

Every row was compared with plain transformers in float32 (tests/test_families.py). `python -m align.models.families`
prints docs/models.md.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from align.errors import InputError
from align.upstream_fixes import gaudi_class, is_gaudi_class, transformers_class

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """What a model type needs that is not the rule.

    The rule: optimum-habana's class where it has one, whose mask is 1 where a token attends, else 0, in the model's
    dtype; else transformers', whose mask is 0 where a token attends, and the dtype's lowest number elsewhere.
    """

    fault: str | Callable[[PretrainedConfig], str | None] | None = None  # of optimum-habana's class: not used
    flattened: bool = False  # optimum-habana's class reshapes the mask to [batch, 1, 1, T * T]: undone on the way
    additive: bool = False  # optimum-habana's class takes the mask that transformers' would
    wrong_attention: tuple[str, ...] = ()  # values of --attn_implementation that are wrong; eager never is
    no_reuse_cache: bool | Callable[[PretrainedConfig], bool] = False  # optimum-habana's class stops with --reuse_cache
    # What optimum-habana's class leaves out with --use_flash_attention
    wrong_flash_attention: str | Callable[[PretrainedConfig], str | None] | None = None
    always_fused: bool = False  # optimum-habana's class has no other attention than Gaudi's fused kernel
    right_when_split: bool = False  # over several cards optimum-habana's class is the one that is right
    # What becomes of a model that DeepSpeed 0.16.9 splits over cards, in either class: it is not split
    split_fault: str | Callable[[PretrainedConfig], str | None] | None = None


def _falcon(config: PretrainedConfig) -> str | None:
    if config.alibi:
        return "adds ALiBi's biases wrongly"
    return "stops at grouped key/value heads" if config.new_decoder_architecture else None


def _gpt_neox(config: PretrainedConfig) -> str | None:
    turned = int(config.hidden_size // config.num_attention_heads * config.rotary_pct)
    return "turns an odd number of a head's dimensions wrongly" if turned % 2 else None


def _phi(config: PretrainedConfig) -> str | None:
    return None if config.num_key_value_heads == config.num_attention_heads else "stops at grouped key/value heads"


def _experts(config: PretrainedConfig) -> str | None:
    if getattr(config, "mlp_only_layers", None):
        return "gives experts to the layers of mlp_only_layers too"
    return None if config.hidden_act == "silu" else f"computes silu where hidden_act is {config.hidden_act}"


def _has_a_cache_of_one_head(config: PretrainedConfig) -> bool:
    return not config.multi_query and not config.new_decoder_architecture


def _flash_mpt(config: PretrainedConfig) -> str | None:
    return None if config.attn_config.softmax_scale is None else "softmax_scale"


def _split_falcon(config: PretrainedConfig) -> str | None:
    return None if config.new_decoder_architecture else STOPS


STOPS = "stops with an error"
# What optimum-habana 1.21.2 does; types that are not named follow the rule.
FAMILIES = {
    "bloom": Family(STOPS, right_when_split=True),
    "codegen": Family(STOPS, split_fault=STOPS),
    "cohere": Family(STOPS),
    "deepseek_v2": Family(STOPS, wrong_attention=("gaudi_fused_sdpa",)),
    "deepseek_v3": Family("cannot be trained", wrong_attention=("gaudi_fused_sdpa",)),
    "falcon": Family(
        _falcon,
        no_reuse_cache=_has_a_cache_of_one_head,
        wrong_attention=("sdpa", "gaudi_fused_sdpa"),
        split_fault=_split_falcon,
    ),
    "falcon_mamba": Family(split_fault=STOPS),
    "gemma": Family("adds the residual after the second norm"),
    "gemma2": Family(
        additive=True,
        no_reuse_cache=True,
        wrong_attention=("sdpa", "gaudi_fused_sdpa"),
        wrong_flash_attention="the soft cap of its attention",
    ),
    "gemma3_text": Family("sees beyond its window"),
    "gpt2": Family(flattened=True),
    "gpt_bigcode": Family("drops attention weights when it should not", split_fault=STOPS),
    "gpt_neo": Family("says other text with a cache"),
    "gpt_neox": Family(_gpt_neox),
    "gpt_oss": Family("sees beyond its window", wrong_attention=("gaudi_fused_sdpa",), split_fault=STOPS),  # no sinks
    "gptj": Family("says other text in padded batches"),
    "mamba": Family(split_fault=STOPS),
    # sdpa is not causal where nothing is padded
    "mixtral": Family(_experts, wrong_attention=("sdpa",), always_fused=True),
    "mpt": Family(wrong_flash_attention=_flash_mpt),
    "olmo2": Family(split_fault=STOPS),
    "opt": Family("says other text with a cache"),
    "persimmon": Family(split_fault="says other text"),
    "phi": Family(_phi),
    "phi3": Family(split_fault=STOPS),
    "qwen2_moe": Family(_experts),
    "qwen3_moe": Family(_experts),
    "starcoder2": Family(STOPS),
    "xglm": Family(STOPS),
}
# Those that transformers alone has, and DeepSpeed splits wrongly
FAMILIES |= {
    kind: Family(split_fault=STOPS)
    for kind in """bamba bitnet ctrl dbrx doge falcon_h1 granitemoehybrid granitemoeshared jamba jetmoe lfm2 mamba2
    minimax modernbert-decoder olmoe openai-gpt phimoe zamba""".split()
}
FAMILIES |= {kind: Family(split_fault="says other text") for kind in ("diffllama", "granitemoe")}
# Layers carry a state, or a convolution, from token to token: no mask keeps the samples of a row apart
STATEFUL = tuple("bamba falcon_h1 falcon_mamba granitemoehybrid jamba lfm2 mamba mamba2 minimax zamba".split())
# Its class ignores padding in front of a text: prompts of a batch have one length
IGNORE_PADDING = ("lfm2",)
# Their caches lose states: those behind padding, or of a first token alone
WITHOUT_CACHE = ("lfm2", "minimax")
# Their positions are a table with an end: a longer text stops the model, or reads beyond it
WITH_A_LAST_POSITION = tuple("biogpt codegen ctrl gpt2 gpt_bigcode gpt_neo gptj mpt openai-gpt opt".split())
# What nothing here computes rightly: optimum-habana has no class of its own, and that of transformers 4.55 is wrong
UNUSABLE = {
    "gemma3n_text": "transformers' class shares keys among layers with a cache alone (modeling_gemma3n.py:1322)",
    "llama4_text": "transformers' class weighs a token's experts by other tokens' scores (modeling_llama4.py:160)",
    "recurrent_gemma": "transformers' class keeps the states of the batch before (modeling_recurrent_gemma.py:329)",
    "rwkv": "transformers' class ignores padding, and changes its own weights between training and evaluation",
    "xlstm": "transformers' class stops at texts of whole chunks (modeling_xlstm.py:231), and ignores padding",
    "zamba2": "transformers' class, without CUDA kernels, adds up states of later tokens (modeling_zamba2.py:889)",
}
DIVIDED_TWICE = ("llama", "mistral", "mixtral")  # they share GaudiLlamaRotaryEmbedding
# What optimum-habana's classes train exactly with Gaudi's fused kernel, samples of a row apart (tests/test_families.py)
EXACT_IN_FUSED_KERNEL = ("falcon", "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")


def check_attention(config: PretrainedConfig, attn_implementation: str | None) -> None:
    if attn_implementation in FAMILIES.get(config.model_type, Family()).wrong_attention:
        raise InputError(
            f"--attn_implementation {attn_implementation}: computes {config.model_type} models wrongly; leave it out"
        )


def find_flash_fault(model: PreTrainedModel) -> str | None:
    """What --use_flash_attention leaves out in the class of this loaded model; None where it is right."""
    if not is_gaudi_class(type(model)):
        return None
    fault = FAMILIES.get(model.config.model_type, Family()).wrong_flash_attention
    return fault(model.config) if callable(fault) else fault


def check_flash_attention(model: PreTrainedModel) -> None:
    """For --use_flash_attention, in training."""
    if left_out := find_flash_fault(model):
        raise InputError(
            f"--use_flash_attention: leaves out {left_out} in {model.config.model_type} models; leave the flag out"
        )


def is_exact_in_fused_kernel(config: PretrainedConfig, longest: int) -> bool:
    """Whether training may compute attention in Gaudi's fused kernel, which has no dropout in these classes."""
    is_known = config.model_type in EXACT_IN_FUSED_KERNEL and is_gaudi_class(choose_class(config, longest))
    return is_known and not getattr(config, "attention_dropout", 0)


def can_reuse_cache(model: PreTrainedModel) -> bool:
    fault = FAMILIES.get(model.config.model_type, Family()).no_reuse_cache
    return hasattr(model, "allocate_kv_cache") and not (fault(model.config) if callable(fault) else fault)


def find_window(config: PretrainedConfig) -> int | None:
    """How many tokens a token sees at most in some layer, itself included."""
    config = config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    if not getattr(config, "use_sliding_window", True):
        return None
    return getattr(config, "sliding_window", None)


def find_context(config: PretrainedConfig) -> int | None:
    """The most tokens of a text, as far as the configuration says."""
    return getattr(config, "max_seq_len" if config.model_type == "mpt" else "max_position_embeddings", None)


def find_scaling(config: PretrainedConfig) -> str | None:
    """How positions are scaled (`rope_scaling`)."""
    scaling = getattr(config, "rope_scaling", None) or {}
    return scaling.get("rope_type", scaling.get("type"))


def find_turn(config: PretrainedConfig) -> int | None:
    """The tokens up to which positions are scaled in one way, where a longer text scales them in another."""
    if find_scaling(config) == "dynamic":
        return config.max_position_embeddings
    if find_scaling(config) == "longrope":
        return getattr(config, "original_max_position_embeddings", config.max_position_embeddings)
    return None


def _find_rope_fault(config: PretrainedConfig, longest: int) -> str | None:
    if find_scaling(config) == "linear" and config.model_type in DIVIDED_TWICE:
        return "divides positions by rope_scaling's factor twice"
    turn = find_turn(config)
    return f"scales positions beyond {turn} as those before" if turn is not None and longest > turn else None


def find_fault(config: PretrainedConfig, longest: int, is_split: bool = False) -> str | None:
    """What is wrong with optimum-habana's class of this model, for texts of up to `longest` tokens."""
    family, window = FAMILIES.get(config.model_type, Family()), find_window(config)
    if gaudi_class(config) is None or (is_split and family.right_when_split):
        return None
    fault = family.fault(config) if callable(family.fault) else family.fault
    if fault is not None:
        return fault
    if window is not None and longest > window:
        return f"does not keep to its window of {window} tokens"
    return _find_rope_fault(config, longest)


def find_split_fault(config: PretrainedConfig) -> str | None:
    """What is wrong with this model when DeepSpeed splits it over cards."""
    fault = FAMILIES.get(config.model_type, Family()).split_fault
    return fault(config) if callable(fault) else fault


def choose_class(
    config: PretrainedConfig, longest: int, is_split: bool = False
) -> type[PreTrainedModel] | type[AutoModelForCausalLM]:
    """The class to load this model with, for texts of up to `longest` tokens: transformers' own where it must be."""
    if find_fault(config, longest, is_split) is not None:
        return transformers_class(config.model_type)
    return gaudi_class(config) or AutoModelForCausalLM


def log_class(config: PretrainedConfig, longest: int, is_split: bool = False) -> None:
    """Says where the model runs without the fused kernels and static shapes of optimum-habana's class, and why."""
    fault = find_fault(config, longest, is_split)
    if fault is not None:
        logger.warning(
            f"{config.model_type}: runs with transformers' own class, slower on a card, as optimum-habana's {fault}"
        )
    turn = find_turn(config)
    if turn is not None and longest > turn:
        logger.warning(
            f"{config.model_type}: rope_scaling ({find_scaling(config)}) changes the positions of all texts in and "
            f"after a row or batch with a text of more than {turn} tokens; data of shorter texts only are not affected"
        )
