"""The table of model families: what was found to be right with each."""

import logging
from dataclasses import dataclass

from transformers import PretrainedConfig

from align.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """How a model type wants its mask; without more it is 1 where a token attends, else 0, in the model's dtype."""

    additive: bool = False  # 0 where a token attends, the dtype's lowest number elsewhere
    by_layer_type: bool = False  # {"full_attention": mask, "sliding_attention": mask}
    flattened: bool = False  # the model reshapes the mask to [batch, 1, 1, T * T]: undone on the way to the attention
    window_margin: int | None = None  # tokens seen beyond config.sliding_window, itself included; None: no window
    attn_implementation: str | None = None  # the one that is right, where the default is not


# Tried with optimum-habana 1.21.2 (tests/test_attention.py). With a 4-D mask none of them applies its window any more,
# and optimum-habana's own masks reach one token further back than transformers'.
FAMILIES = {
    "gemma2": Family(additive=True, by_layer_type=True, window_margin=1),
    "gpt2": Family(flattened=True),
    "gptj": Family(flattened=True),
    "llama": Family(),
    "mistral": Family(window_margin=1),
    "mixtral": Family(window_margin=1, attn_implementation="eager"),
    "phi3": Family(additive=True, window_margin=0),  # transformers' own code
    "qwen2": Family(),
    "qwen3": Family(),
}


def choose_attn_implementation(config: PretrainedConfig) -> str | None:
    """The `attn_implementation` to load this model with; None leaves it to transformers."""
    family = FAMILIES.get(config.model_type)
    return family and family.attn_implementation


# What optimum-habana 1.21.2 computes otherwise than the transformers that these models were made with
WRONG = {"gemma": "adds the residual after the second norm"}
WRONG_IN_GENERATION = {
    "gemma3_text": "says other text than with a whole forward pass",
    "gpt_neo": "says other text with a cache",
    "opt": "says other text with a cache",
}
WRONG_IN_PREFERENCES = {"gpt_bigcode": "drops attention weights that --disable_dropout does not reach"}
WRONG_IN_SHARED_PROMPTS = ("gpt_neo", "mpt")  # a window, and ALiBi, which count columns and not positions


def find_window(config: PretrainedConfig) -> int | None:
    """How many tokens a token sees at most in some layer, itself included."""
    config = config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    if not getattr(config, "use_sliding_window", True):
        return None
    return getattr(config, "sliding_window", None)


def can_share_prompts(config: PretrainedConfig) -> bool:
    """Whether two answers may stand behind one prompt; says why not."""
    wrong = config.model_type in WRONG_IN_SHARED_PROMPTS
    if wrong:
        logger.warning(f"--share_prompts: {config.model_type} models count columns, not positions; pairs are padded")
    return not wrong


def check_family(config: PretrainedConfig, longest: int, flag: str, wrong: dict[str, str] | None = None) -> None:
    """Refuses what would be wrong in silence; `longest` is the most tokens of a text, `wrong` beside `WRONG`."""
    kind, window = config.model_type, find_window(config)
    fault = {**WRONG, **(wrong or {})}.get(kind)
    if fault is not None:
        raise InputError(f"{flag}: optimum-habana computes {kind} models wrongly: it {fault}; choose another model")
    if window is not None and longest > window:
        raise InputError(
            f"{flag}: this {kind} model has a window of {window} tokens, and optimum-habana does not keep to it; texts "
            f"of up to {longest} are too long, make them shorter"
        )
