"""The table of model families: what was found to be right with each."""

from dataclasses import dataclass

from transformers import PretrainedConfig


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
