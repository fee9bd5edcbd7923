"""Reads a model's folder before transformers does: what would run code, is damaged, or would be misread, is refused.

Every refusal is one line that names the flag, the file, and what to do. Heavy packages are imported where they are
used: run_generation.py and the merge check folders before they need them.
"""

import inspect
import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from align.errors import InputError, one_line
from align.merge.checkpoints import (
    FLOATS,
    Checkpoint,
    NotStreamableError,
    StoredTensor,
    find_folder,
    open_checkpoint,
    read_json,
    same_bytes,
)
from align.merge.plan import EMBEDDING
from align.upstream_fixes import gaudi_class, is_gaudi_class, transformers_config_class

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py")  # all files of a model but its weights
SETTINGS: tuple[str, ...] = ("config.json", "generation_config.json", "tokenizer_config.json")
SETTINGS += ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
SIZES: tuple[str, ...] = (
    *LAYER_COUNTS,
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "n_positions",
)
SIZES += ("num_attention_heads", "num_key_value_heads", "n_head", "n_embd", "head_dim", "sliding_window", "window_size")
MAY_BE_NONE = ("intermediate_size", "num_key_value_heads", "head_dim", "sliding_window")
ABOVE_ZERO = ("rope_theta", "rotary_emb_base", "rope_local_base_freq")
DROPOUT = re.compile(r"^(?!classifier).*(?:dropout|drop|dropout_prob)$")
NEVER_NONE = re.compile(rf"(?:eps|epsilon)$|{DROPOUT.pattern}|{'|'.join(ABOVE_ZERO)}")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Types whose classes give no padding to their embedding, so that any number of it will do
WITHOUT_PADDING = tuple(
    """bloom codegen ctrl falcon falcon_mamba gpt2 gpt_bigcode gpt_neo gpt_neox gptj mamba mamba2 mpt
    openai-gpt""".split()
)
HEADS = ("lm_head.weight", "embed_out.weight", "head.weight")
# Of a generation_config.json, or beside a model's entries in config.json
NUMBERS = tuple(
    """max_length max_new_tokens max_time min_length min_new_tokens num_beams num_beam_groups num_return_sequences
    temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff penalty_alpha diversity_penalty length_penalty
    repetition_penalty encoder_repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size""".split()
)
SWITCHES = ("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values")
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # one thing in three spellings
# Entries of transformers 5 for what 4.55 does anyway, or finds out by itself
NEW_AND_HARMLESS = ("head_dim", "qk_head_dim", "num_nextn_predict_layers", "_sliding_window_pattern")
PARTS_OF_A_DECODER = ("attn_config", "ffn_config")  # sub-configs that are no models: mpt's and dbrx's
PARTS_WITH_PICTURES = ("text_config", "vision_config")
OWN_SCALINGS = {"phi3": ("su",), "qwen2_vl": ("mrope",), "qwen2_5_vl": ("mrope",)}  # names of longrope and default
PARTS_WITH_TEXT = ("text_config", "text_encoder", "decoder", "generator")  # that transformers looks for in any model


# ---------------------------------------------------------------- code


def check_folder(
    folder: Path, flag: str, trust_remote_code: bool | None = None, trust_tokenizer: bool | None = None
) -> None:
    """Refuses settings that make transformers 4.55 run code, or read other files than the ones that are checked here.

    `trust_remote_code` allows the code that comes with the model (`auto_map`) and no other; it is None where the script
    has no such flag. A model of a type that transformers knows needs no code of its own. `trust_tokenizer`, where
    given, decides about the tokenizer's code.
    """
    for name in SETTINGS:
        path = folder / name
        if not path.exists() and not path.is_symlink():
            continue
        settings = read_json(path)
        is_tokenizer = name == "tokenizer_config.json" and trust_tokenizer is not None
        _check_keys(path, settings, flag, trust_tokenizer if is_tokenizer else trust_remote_code)
        _check_generation(path, settings, flag)
        if name == "config.json":
            _check_config(path, settings, flag)
    if (folder / "custom_generate" / "generate.py").exists() and not trust_remote_code:
        raise InputError(
            f"{flag}: {folder} brings code of its own to generate with (custom_generate); remove it"
            + _or_trust(trust_remote_code)
        )
    if (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        # AutoModelForCausalLM would load the base that the adapter names, wherever that is.
        raise InputError(
            f"{flag}: {folder} holds a model and an adapter (adapter_config.json); keep them in two folders, or merge "
            "them with merge_peft_adapter.py"
        )


def _or_trust(trust_remote_code: bool | None) -> str:
    return "" if trust_remote_code is None else ", or add --trust_remote_code if you trust it"


def _check_keys(path: Path, settings: dict, flag: str, trust_remote_code: bool | None) -> None:
    for place, key, value in _walk(settings):
        if not value:
            continue
        nested = f"{place}.{key}" if place else key
        if key == "auto_map" and not trust_remote_code:
            if not place and path.name == "config.json" and _is_known(settings):
                continue  # `load_config` leaves it out
            is_type = not place and path.name == "config.json"  # that the installed transformers does not know
            trust = _or_trust(trust_remote_code)
            way = (
                trust.replace(", or add", "; add")
                if is_type
                else f"; take that entry out to use the installed classes{trust}"
            )
            raise InputError(
                f"{flag}: {path} asks to run code that comes with it ({nested}: {_first_text(value)}){way}"
            )
        if key == "trust_remote_code" and not trust_remote_code:
            raise InputError(f"{flag}: {path} sets {nested} itself; take it out{_or_trust(trust_remote_code)}")
        if key in ("_name_or_path", "name_or_path") and place:
            # LightGlue's configuration loads it, code and all (CVE-2026-5241).
            raise InputError(f"{flag}: {path} leads to another model ({nested}: {value}); take that entry out")
        if key in ATTENTION_KEYS and any("/" in text for text in _texts(value)):
            raise InputError(
                f"{flag}: {path} asks for attention code from the hub ({nested}: {_first_text(value)}); take it out"
            )


def _check_generation(path: Path, settings: dict, flag: str) -> None:
    """Refuses what transformers stops at, or takes for yes.

    Several tokens may end a text, and -1 is what some write for no padding.
    """
    for name in TOKEN_IDS:
        value = settings.get(name)
        ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
        least = -1 if name == "pad_token_id" else 0
        if value is not None and not all(type(each) is int and each >= least for each in ids):
            wanted = "a token's number" + (", or several" if name == "eos_token_id" else "")
            raise InputError(
                f"{flag}: {path}: {name} is {repr(value)[:40]}, not {wanted}; mend that entry, or take it out"
            )
    for names, kinds, wanted in ((NUMBERS, (int, float), "a number"), (SWITCHES, (bool, int), "true or false")):
        for name in names if path.name in ("config.json", "generation_config.json") else ():
            value = settings.get(name)
            if value is not None and type(value) not in kinds:
                raise InputError(
                    f"{flag}: {path}: {name} is {repr(value)[:40]}, not {wanted}; mend that entry, or take it out"
                )


def _check_vocabulary(folder: Path, config: "PretrainedConfig", flag: str) -> None:
    """Refuses padding, and tells of ends, that no token of this vocabulary is.

    Padding of -1, or of a model whose class has no use for it, is told and becomes none in `config`: torch would take
    -1 for the last token, whose row of the embedding is then never trained.
    """
    size = config.get_text_config().vocab_size
    for path in (folder / "config.json", folder / "generation_config.json"):
        settings = read_json(path) if path.is_file() else {}
        for key in TOKEN_IDS:
            value = settings.get(key)
            ids = [each for each in (value if isinstance(value, list) else [value]) if each is not None]
            if all(0 <= each < size for each in ids):
                continue
            what = f"{flag}: {path}: {key} is {value}, and the tokens of this model are 0 to {size - 1}"
            if key != "pad_token_id":
                _warn_once(f"{what}: no text {'ends' if key == 'eos_token_id' else 'begins'} with what is beyond")
            elif path.name == "config.json":  # a row of the embedding, for most models
                if value != -1 and config.model_type not in WITHOUT_PADDING:
                    raise InputError(f"{what}; mend that entry, or take it out")
                _warn_once(f"{what}: it is taken for none")
                config.pad_token_id = None


def _is_known(config: dict) -> bool:
    """Whether transformers itself has the classes of this model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return config.get("model_type") in list(CONFIG_MAPPING_NAMES)


@lru_cache
def _warn_once(message: str) -> None:
    """A folder is read several times in a run."""
    logger.warning(message)


def _check_config(path: Path, config: dict, flag: str) -> None:
    if config.get("configuration_files") or config.get("transformers_weights"):
        key = "configuration_files" if config.get("configuration_files") else "transformers_weights"
        raise InputError(
            f"{flag}: {path} leads to other files ({key}: {_first_text(config[key])}); take that entry out"
        )
    for key in QUANTIZATION_KEYS:
        if config.get(key):
            method = config[key].get("quant_method") if isinstance(config[key], dict) else None
            raise InputError(
                f"{flag}: {path.parent} is quantised ({method or key}), which is not trained, merged or run here; give "
                "the model that it was made from"
            )


def _walk(settings: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each entry of nested JSON: the place of its object (empty at the top), its key and its value."""
    for key, value in settings.items() if isinstance(settings, dict) else enumerate(settings):
        if isinstance(settings, dict):
            yield place, key, value
        if isinstance(value, (dict, list)):
            yield from _walk(value, f"{place}.{key}" if place else str(key))


def _texts(value: Any) -> Iterator[str]:
    """The strings in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def _first_text(value: Any) -> str:
    return next(_texts(value), str(value))


def check_adapter(folder: Path, flag: str) -> dict:
    """The adapter_config.json of an adapter's folder, whose settings run no code and whose base is a name."""
    path = folder / "adapter_config.json"
    if not path.exists():
        raise InputError(f"{flag}: {folder} has no adapter_config.json; give an adapter's folder")
    config = read_json(path)
    if config.get("megatron_config") or config.get("megatron_core") not in (None, "megatron.core"):
        # PEFT imports whatever module `megatron_core` names (peft 0.17.1, tuners/lora/tp_layer.py:324).
        raise InputError(f"{flag}: {path} is made for Megatron (megatron_config), which is not used here")
    _check_keys(path, config, flag, trust_remote_code=None)
    base = config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise InputError(f"{flag}: {path} names no base (base_model_name_or_path: {base!r}); write its name there")
    return config


# ---------------------------------------------------------------- configuration and tokenizer


def find_model(name: str, flag: str, trust_remote_code: bool = False, token: str | None = None) -> Path:
    """The checked folder of a model or tokenizer, or of its small files where it is on the hub."""
    folder = find_folder(name, flag, *SMALL_FILES, token=token)
    check_folder(folder, flag, trust_remote_code)
    return folder


def load_config(
    folder: Path, flag: str, trust_remote_code: bool = False, for_merge: bool = False
) -> "PretrainedConfig":
    """The configuration in a folder that `check_folder` has passed: that of a causal language model.

    With `for_merge`, where nothing is computed, it may have parts for pictures, as Gemma 3 does, and a wrong class.
    """
    from transformers import AutoConfig, GenerationConfig
    from transformers.utils.hub import extract_commit_hash

    if not (folder / "config.json").is_file():
        hint = "; it holds an adapter: merge that one first" if (folder / "adapter_config.json").exists() else ""
        raise InputError(f"{flag}: no model at {folder}: there is no config.json{hint}")
    path = folder / "config.json"
    content = read_json(path)
    for name in SIZES:
        value = content.get(name)
        sizes = value if isinstance(value, list) and name == "intermediate_size" else [value]  # Gemma 3n has a list
        if value is not None and any(type(size) is not int or size < 1 for size in sizes):
            raise InputError(
                f"{flag}: {path}: {name} is {value!r}, not a whole number above 0; copy or download it again"
            )
    try:
        own_code = (trust_remote_code and content.get("auto_map")) or {}
        if "AutoConfig" in own_code:
            if "AutoModelForCausalLM" not in own_code:
                raise InputError(
                    f"{flag}: {folder} brings code for a configuration and none for a causal language model (auto_map)"
                )
            return AutoConfig.from_pretrained(folder, trust_remote_code=True)
        config_class = _find_class(content, folder, flag, for_merge)
        _check_kinds(content, config_class, path, flag)
        if content.pop("auto_map", None):
            _warn_once(
                f"{flag}: {path} names code that comes with it (auto_map), which is not run: transformers' own class "
                f"of a {content['model_type']} model is"
            )
        for key in ATTENTION_KEYS:
            if content.get(key) not in (None, "eager", "sdpa"):
                logger.warning(
                    f"{flag}: {path} asks for {content.pop(key)}, which Gaudi does not have; its own are used"
                )
        for key in QUANTIZATION_KEYS:
            if not content.get(key):  # null means none, which transformers does not know
                content.pop(key, None)
        about = {"_commit_hash": extract_commit_hash(str(path.absolute()), None)}
        translated = translate_config(content, config_class, path, flag)
        if translated is not content:
            content = translated
            _check_kinds(content, config_class, path, flag)
        if is_gaudi_class(config_class):
            content = transformers_config_class(content["model_type"]).from_dict(content).to_dict()
        config = config_class.from_dict(content | about)
        config.name_or_path = str(folder)  # whatever the file says
        if is_gaudi_class(config_class) and content.get("head_dim"):  # GaudiLlamaConfig forgets it
            config.head_dim = content["head_dim"]
        if getattr(config, "head_dim", 0) is None:  # some ways to scale positions take it from here alone
            config.head_dim = config.hidden_size // config.num_attention_heads
        _check_layers(config, path, flag)
        _check_vocabulary(folder, config, flag)
        path = folder / "generation_config.json"
        if path.is_file():
            GenerationConfig.from_dict(read_json(path))
        return config
    except InputError:
        raise
    except Exception as error:  # a wrong value may make a configuration's own code raise anything
        raise InputError(f"{flag}: {path} cannot be used: {one_line(error)}") from error


def _find_class(config: dict, folder: Path, flag: str, for_merge: bool) -> type["PretrainedConfig"]:
    """Refuses all but causal language models: other configurations may load more than themselves."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from align.models.families import UNUSABLE

    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise InputError(f"{flag}: {folder}/config.json has no model_type; give the folder of a causal language model")
    if not _is_known(config):  # optimum-habana adds types, of which there is no other class to compare with
        raise InputError(
            f"{flag}: {folder} is a {kind!r} model, which the installed transformers does not know; docs/models.md "
            "names those that were tried"
        )
    config_class = CONFIG_MAPPING[kind]
    others = {
        *modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        *(() if for_merge else modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    }
    parts = getattr(config_class, "sub_configs", None) or {}
    takes_any = AutoConfig in parts.values()  # for a part
    known = {*PARTS_OF_A_DECODER, *(PARTS_WITH_PICTURES if for_merge and not takes_any else ())}
    is_causal = config_class in AutoModelForCausalLM._model_mapping and kind not in others
    is_decoder = is_causal and not parts.keys() - known
    if not is_decoder or config.get("is_encoder_decoder"):
        raise InputError(f"{flag}: {folder} is a {kind} model; give a causal language model, of text alone")
    if kind in UNUSABLE and not for_merge:
        raise InputError(f"{flag}: {folder} is a {kind} model, which is not used here: {UNUSABLE[kind]}")
    return config_class


def _check_kinds(config: dict, config_class: type["PretrainedConfig"], path: Path, flag: str) -> None:
    """Refuses what is no number or switch where that class wants one, and entries that would be misread."""
    from transformers import PretrainedConfig

    def refuse(name: str, wanted: str) -> InputError:
        value = repr(config[name])[:40]
        return InputError(f"{flag}: {path}: {name} is {value}, not {wanted}; mend that entry, or take it out")

    for owner in (PretrainedConfig, config_class):
        for name, parameter in inspect.signature(owner.__init__).parameters.items():
            value, default = config.get(name), parameter.default
            if name not in config or name in TOKEN_IDS or not isinstance(default, (int, float)):
                continue
            if value is None:
                is_wrong = NEVER_NONE.search(name) or (name in SIZES and name not in MAY_BE_NONE)
            else:
                is_wrong = isinstance(value, (str, list, dict)) or value != value
            if is_wrong:
                raise refuse(name, "true or false" if isinstance(default, bool) else "a number")
    for name, value in config.items():
        if DROPOUT.search(name) and isinstance(value, (int, float)) and not 0 <= value <= 1:
            raise refuse(name, "a number from 0 to 1")
        if name in ABOVE_ZERO and isinstance(value, (int, float)) and value <= 0:
            raise refuse(name, "a number above 0")
    for name in ("torch_dtype", "dtype"):
        value = config.get(name)
        if isinstance(value, dict) or value is None:
            continue
        import torch

        if not isinstance(value, str) or not isinstance(getattr(torch, value, None), torch.dtype):
            raise refuse(name, "a type of numbers that torch has")
    if not getattr(config_class, "sub_configs", None):
        for name in PARTS_WITH_TEXT:
            if config.get(name):
                raise refuse(name, f"a part that a {config['model_type']} model has")
    if config.get("partial_rotary_factor") not in (None, 1) and not hasattr(config_class(), "partial_rotary_factor"):
        raise refuse("partial_rotary_factor", f"an entry of {config['model_type']} models, which turn whole heads")
    if config.get("rope_scaling") is not None:
        _check_scaling(config, path, flag)


def _check_scaling(config: dict, path: Path, flag: str) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = config["rope_scaling"]
    is_object = isinstance(scaling, dict)
    kind = scaling.get("rope_type", scaling.get("type")) if is_object else scaling
    if not is_object or kind not in (*ROPE_INIT_FUNCTIONS, *OWN_SCALINGS.get(config["model_type"], ())):
        raise InputError(
            f"{flag}: {path}: rope_scaling is of type {kind!r}; transformers 4.55 knows "
            f"{', '.join(sorted(ROPE_INIT_FUNCTIONS))}"
        )
    for name, value in scaling.items():
        if name in ("rope_type", "type", "mrope_section"):
            continue
        numbers = value if name in ("short_factor", "long_factor") and isinstance(value, list) else [value]
        if not all(isinstance(number, (int, float, NoneType)) for number in numbers):
            raise InputError(f"{flag}: {path}: {name} of rope_scaling is {repr(value)[:40]}, not a number; mend it")
        if name.endswith("factor") and any(number is not None and number <= 0 for number in numbers):
            raise InputError(f"{flag}: {path}: {name} of rope_scaling is {repr(value)[:40]}, not above 0; mend it")
    name = "original_max_position_embeddings"
    if kind == "longrope" and name in scaling and scaling[name] != config.get(name):
        raise InputError(
            f"{flag}: {path}: rope_scaling has {name}, which transformers 4.55 looks for beside rope_scaling where its "
            "type is longrope; move that entry there"
        )


def _check_layers(config: "PretrainedConfig", path: Path, flag: str) -> None:
    """Refuses kinds of layers that the model's class would stop at, or that optimum-habana's would not read."""
    kinds, number = getattr(config, "layer_types", None), getattr(config, "num_hidden_layers", 0)
    if not isinstance(kinds, list) or "layer_types" not in inspect.signature(type(config).__init__).parameters:
        return
    if len(kinds) < number:
        raise InputError(f"{flag}: {path}: layer_types names {len(kinds)} of the {number} layers; mend that entry")
    if gaudi_class(config) is not None and (others := sorted(set(kinds) - {"full_attention", "sliding_attention"})):
        raise InputError(f"{flag}: {path}: layer_types has {others[0]}, which {config.model_type} models do not have")
    if "sliding_attention" in kinds and getattr(config, "sliding_window", None) is None:
        raise InputError(
            f"{flag}: {path}: layer_types has sliding_attention, and there is no sliding_window; mend those entries"
        )


def translate_config(config: dict, config_class: type["PretrainedConfig"], path: Path, flag: str) -> dict:
    """Translates a configuration of transformers 5 for 4.55, which ignores entries that it does not know."""
    if not (config.keys() & {"rope_parameters", "dtype"} or str(config.get("transformers_version")).startswith("5")):
        return config
    from transformers import PretrainedConfig

    config = dict(config)
    known = set(inspect.signature(config_class.__init__).parameters)
    if config.get("dtype") is not None:
        config["torch_dtype"] = config["dtype"]
    config.pop("dtype", None)
    if config.get("head_dim", 0) is None:
        del config["head_dim"]
    given, wanted = (set(EXPERT_COUNTS) & names for names in (config.keys(), known))
    if given and wanted and not given & wanted:
        config[wanted.pop()] = config.pop(given.pop())
    if config.get("use_bidirectional_attention"):
        raise InputError(f"{flag}: {path}: use_bidirectional_attention: this is not a causal language model")
    rope, translated = config.pop("rope_parameters", None), {}
    if rope:
        translated = _translate_rope(rope, config, config_class, path, flag)
        for name, value in translated.items():
            if config.get(name, value) not in (value, None):
                raise InputError(
                    f"{flag}: {path}: rope_parameters makes {name} {value}, and {name} is {config[name]}; take one out"
                )
        config |= translated
    known |= (
        PretrainedConfig().to_dict().keys()
        | set(config_class.attribute_map)
        | set(NEW_AND_HARMLESS)
        | translated.keys()
    )
    if unread := [name for name, value in config.items() if name not in known and value not in (None, False)]:
        logger.warning(
            f"{flag}: {path} is of transformers 5; 4.55 does not use its entries {', '.join(sorted(unread))}"
        )
    return config


def _translate_rope(
    rope: dict, config: dict, config_class: type["PretrainedConfig"], path: Path, flag: str
) -> dict[str, Any]:
    """Transformers 5's `rope_parameters` as 4.55's entries, where that model's class reads each of them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    def refuse(what: str) -> InputError:
        return InputError(
            f"{flag}: {path} is of transformers 5, and 4.55's {config['model_type']} model cannot take its "
            f"rope_parameters ({what})"
        )

    known = set(inspect.signature(config_class.__init__).parameters)
    new = {}
    if not isinstance(rope, dict):
        raise refuse(str(rope))
    if all(isinstance(value, dict) for value in rope.values()):  # one set for each type of layer
        if "rope_local_base_freq" not in known or set(rope) != {"full_attention", "sliding_attention"}:
            raise refuse(", ".join(rope))
        local = rope["sliding_attention"]
        if local.get("rope_theta") is None:
            raise refuse("a sliding_attention without rope_theta")
        if set(local) - {"rope_theta", "rope_type"} or local.get("rope_type", "default") != "default":
            raise refuse("a scaled sliding_attention")
        new["rope_local_base_freq"] = local["rope_theta"]
        rope = rope["full_attention"]
    elif "rope_local_base_freq" in known:
        raise refuse("one set for layers of two types")
    rope = {name: value for name, value in rope.items() if value is not None}
    kind = rope.pop("rope_type", None) or rope.pop("type", "default")
    names = {
        "rope_theta": ("rope_theta", "rotary_emb_base"),
        "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
    }
    for name, spellings in names.items():
        value = rope.pop(name, None)
        spelling = next((each for each in spellings if each in known), None)
        if spelling is not None and value is not None:
            new[spelling] = value
        elif name == "rope_theta" or value not in (None, 1.0):
            raise refuse(f"{name}: {value}")
    if kind == "default":
        if rope:
            raise refuse(", ".join(rope))
        scaled = inspect.signature(config_class.__init__).parameters.get("rope_scaling")
        return new if scaled is None or scaled.default is None else new | {"rope_scaling": None}  # GPT-OSS scales
    if kind not in ROPE_INIT_FUNCTIONS or "rope_scaling" not in known:
        raise refuse(f"rope_type: {kind}")
    original = rope.get("original_max_position_embeddings")
    if original and "factor" in rope and kind in ("yarn", "longrope"):
        # 4.55 computes it (modeling_rope_utils.py:244), 5 takes the given one.
        implied = config.get("max_position_embeddings", original) / original
        if implied != rope["factor"]:
            raise refuse(f"factor {rope['factor']:g}, where the lengths make it {implied:g}")
    if kind == "longrope":
        if "original_max_position_embeddings" in rope:  # which 4.55 looks for beside it
            new["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
        return new | {"rope_scaling": {"type": kind, **rope}}
    return new | {"rope_scaling": {"rope_type": kind, **rope}}


def load_tokenizer(folder: Path, flag: str, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer in a folder that `check_folder` has passed."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging as logging_of_transformers

    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    changes: dict[str, Any] = {}
    if not isinstance(most := settings.get("model_max_length"), (int, float, NoneType)):
        raise InputError(f"{flag}: {path}: model_max_length is {most!r}, not a number; mend that entry, or take it out")
    if isinstance(settings.get("extra_special_tokens"), list):  # transformers 5's additional_special_tokens
        more = settings.get("additional_special_tokens") or []
        changes["additional_special_tokens"] = [*more, *settings["extra_special_tokens"]]
        changes["extra_special_tokens"] = settings.get("model_specific_special_tokens") or {}
    loader = AutoTokenizer
    if settings.get("backend") == "tokenizers" or settings.get("tokenizer_class") == "TokenizersBackend":
        # Written by transformers 5: tokenizer.json alone says how; classes of 4.55 would change it by their own rules.
        if not (folder / "tokenizer.json").is_file():
            raise InputError(f"{flag}: {folder} has no tokenizer.json; copy or download it again")
        loader = PreTrainedTokenizerFast
    verbosity = logging_of_transformers.get_verbosity()
    if loader is PreTrainedTokenizerFast:
        logging_of_transformers.set_verbosity_error()  # it would warn of the other class
    try:
        tokenizer = loader.from_pretrained(folder, trust_remote_code=trust_remote_code, **changes)
    except Exception as error:  # a damaged file may make a tokenizer's own code raise anything
        # The error may be of a package for older formats; why this format was not read stands before it.
        reason = one_line(error.__context__ if isinstance(error, ImportError) and error.__context__ else error)
        if not (folder / "tokenizer.json").is_file():
            reason = f"there is no tokenizer.json ({reason})"
        raise InputError(f"{flag}: no tokenizer at {folder}: {reason}; copy or download it again") from error
    finally:
        logging_of_transformers.set_verbosity(verbosity)
    merges: Any = tokenizer.backend_tokenizer.model if getattr(tokenizer, "is_fast", False) else None
    if getattr(merges, "dropout", None):
        merges.dropout = None
        _warn_once(f"{flag}: {folder}/tokenizer.json leaves out merges at random (dropout); here it leaves out none")
    return tokenizer


def mend_generation_config(model: "PreTrainedModel", flag: str) -> None:
    """Takes out fields without effect, such as a temperature without sampling, which transformers refuses to save.

    Text is the same without. Entries that stand in config.json are moved as saving would move them.
    """
    from transformers import GenerationConfig

    config, defaults = model.generation_config, GenerationConfig()
    for name, value in model.config._get_non_default_generation_parameters().items():
        setattr(config, name, value)
        setattr(model.config, name, None)
    try:
        config.validate(strict=True)
        return
    except ValueError as error:
        invalid = re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE)
        reason = one_line(error)
    for name in invalid:
        setattr(config, name, getattr(defaults, name))
    try:
        config.validate(strict=True)
    except ValueError:
        raise InputError(
            f"{flag}: {config._name_or_path or model.name_or_path}: generation_config.json: {reason}"
        ) from None
    logger.warning(
        f"{flag}: generation_config.json of {model.name_or_path} sets {', '.join(invalid)} without effect (it neither "
        "samples nor searches beams); what is saved leaves that out"
    )


# ---------------------------------------------------------------- weights


def find_weights(name: str, flag: str, token: str | None = None) -> Path:
    """The folder of a model with its weights, which come from the hub where they are not local."""
    folder = find_folder(name, flag, *SMALL_FILES, "*.safetensors", token=token)
    if not any(folder.glob("*.safetensors")):
        folder = find_folder(name, flag, *SMALL_FILES, "*.bin", token=token)
    return folder


def check_weights(
    folder: Path,
    config: "PretrainedConfig",
    flag: str,
    trust_remote_code: bool = False,
    rank: int = 0,
    ranks: int = 1,
    has_head: bool = True,
) -> None:
    """Compares names and shapes in the files' headers with the model that `config` makes, then looks for NaN.

    Every rank looks at its share of the values. `has_head` is False where the head is not used.
    """
    try:
        checkpoint = open_checkpoint(folder)
    except NotStreamableError as reason:
        logger.warning(f"{flag}: {folder} is not checked before it is loaded: {reason}")
        return
    except InputError as error:
        raise InputError(f"{flag}: {error}") from None
    _check_about_files(checkpoint, flag)
    check_layers(checkpoint, config.to_dict(), flag)
    check_head(checkpoint, config.to_dict(), flag)
    used = _match(checkpoint, config, flag, trust_remote_code, has_head)
    check_values(used[rank::ranks], flag)


def _check_about_files(checkpoint: Checkpoint, flag: str) -> None:
    """Refuses what files say about themselves that transformers would stop at."""
    from safetensors import safe_open

    for stem in ("model.safetensors", "pytorch_model.bin"):
        index, is_used = checkpoint.folder / f"{stem}.index.json", stem not in checkpoint.files
        if is_used and index.exists() and not isinstance(read_json(index).get("metadata"), dict):
            raise InputError(f'{flag}: {index} has no object "metadata"; add it ({{}} will do), or download it again')
    for path in sorted({tensor.path for tensor in checkpoint.tensors.values()}):
        if path.suffix == ".safetensors":
            with safe_open(path, "np") as file:
                made_by = (file.metadata() or {}).get("format", "pt")
            if made_by not in ("pt", "mlx"):
                raise InputError(
                    f"{flag}: {path} is of another library than torch (format: {made_by}); convert it first"
                )


def check_layers(checkpoint: Checkpoint, config: dict, flag: str) -> None:
    """Refuses files with fewer layers than the configuration: the others would be random numbers."""
    expected = next((config[name] for name in LAYER_COUNTS if isinstance(config.get(name), int)), None)
    held = {int(found[1]) for name in checkpoint.tensors if (found := LAYER.search(name))}
    if expected is not None and held and (missing := set(range(expected)) - held):
        raise InputError(
            f"{flag}: {checkpoint.folder}/config.json asks for {expected} layers, the files hold {len(held)}: there is "
            f"nothing of layer {min(missing)}; copy or download them again"
        )


def check_sizes(checkpoint: Checkpoint, config: dict, flag: str, has_head: bool = True) -> None:
    """Refuses files of another model than the configuration's, where that can be told without the model's code.

    Most families have the shapes that are looked at; where one differs, the model that config.json makes decides.
    """
    texts = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    width, heads, depth = (texts.get(name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    head = texts.get("head_dim") or (width and heads and width // heads) or 0
    shapes = {  # None or 0: any
        ".embed_tokens.weight": (texts.get("vocab_size"), width),
        ".mlp.up_proj.weight": (texts.get("intermediate_size"), width),
        ".self_attn.q_proj.weight": ((heads or 0) * head, width),
        ".self_attn.k_proj.weight": ((texts.get("num_key_value_heads") or heads or 0) * head, width),
    }
    layers = [int(found[1]) for name in checkpoint.tensors if (found := LAYER.search(name))]
    differs = bool(depth and layers) and max(layers) + 1 != depth
    for name, tensor in checkpoint.tensors.items():
        wanted = next((shape for end, shape in shapes.items() if name.endswith(end)), ())
        differs |= any(size and size != there for size, there in zip(wanted, tensor.shape, strict=False))
    if not differs:
        return
    try:
        if config.get("auto_map"):
            raise InputError("it names code of its own, which is not run")
        loadable = load_config(checkpoint.folder, flag, for_merge=True)
    except InputError as error:
        logger.info(f"The sizes in {checkpoint.folder}/config.json are not compared with the weights: {error}")
        return
    _match(checkpoint, loadable, flag, trust_remote_code=False, has_head=has_head)


def check_head(checkpoint: Checkpoint, config: dict, flag: str, wants_head: bool = False) -> None:
    """Tells of a head in the files that is not the embedding, where the configuration makes the two one tensor.

    With `wants_head` it refuses files without one, where the configuration makes them two.
    """
    stored = checkpoint.tensors
    embedding = min(filter(EMBEDDING.search, stored), key=len, default=None)
    head = next((name for name in HEADS if name in stored), None)
    if embedding is None:
        return
    alike = [name for name, tensor in stored.items() if tensor.shape == stored[embedding].shape]
    if wants_head and config.get("tie_word_embeddings") is False and alike == [embedding]:
        raise InputError(
            f"{flag}: {checkpoint.folder} holds no head beside {embedding}, and its config.json wants one "
            "(tie_word_embeddings is false); copy or download it again"
        )
    if head is not None and is_tied(config) and not same_bytes(stored[embedding], stored[head]):
        _warn_once(
            f"{flag}: {checkpoint.folder} stores two tensors, {embedding} and {head}, where its config.json says one "
            "(tie_word_embeddings): the first is used for both, as transformers does; false there uses each"
        )


def is_tied(config: dict) -> bool:
    """Whether head and embedding are one tensor: what config.json says, else what its type means."""
    if config.get("tie_word_embeddings") is not None:
        return bool(config["tie_word_embeddings"])
    if isinstance(config.get("text_config"), dict):
        return is_tied(config["text_config"])
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    return kind in CONFIG_MAPPING and bool(getattr(CONFIG_MAPPING[kind](), "tie_word_embeddings", True))


def empty_model(config: "PretrainedConfig", flag: str, trust_remote_code: bool = False) -> "PreTrainedModel":
    """The model of that configuration on the meta device: names and shapes, no memory."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import no_init_weights

    from align.models.families import choose_class

    try:
        with torch.device("meta"), no_init_weights():
            if type(config) in AutoModelForCausalLM._model_mapping:
                # The class itself: from_config would shard it under ZeRO-3.
                chosen = choose_class(config, longest=1)
                mapped = AutoModelForCausalLM._model_mapping[type(config)]
                model = (mapped if chosen is AutoModelForCausalLM else chosen)(config)
            else:
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            model.tie_weights()
    except Exception as error:  # a wrong size may make a model's own code raise anything
        raise InputError(f"{flag}: {config.name_or_path}/config.json makes no model: {one_line(error)}") from error
    return model


def _match(
    checkpoint: Checkpoint, config: "PretrainedConfig", flag: str, trust_remote_code: bool, has_head: bool
) -> list[StoredTensor]:
    """The stored tensors that the model takes, by the rules that transformers 4.55 loads with."""
    from transformers.modeling_utils import VLMS, _find_missing_and_unexpected_keys

    folder, stored = checkpoint.folder, checkpoint.tensors
    model = empty_model(config, flag, trust_remote_code)
    prefix = model.base_model_prefix
    has_prefix = bool(prefix) and any(name.startswith(prefix) for name in stored)
    wants_prefix = bool(prefix) and hasattr(model, prefix)
    has_other_names = any(name in type(model).__name__.lower() for name in VLMS)  # on disk than its modules
    conversion = model._checkpoint_conversion_mapping if has_other_names else None
    mapping = model._get_key_renaming_mapping(
        list(stored), conversion, has_prefix and not wants_prefix, wants_prefix and not has_prefix
    )
    missing, unexpected = _find_missing_and_unexpected_keys(
        type(model), model, list(stored), list(mapping.values()), has_prefix and not wants_prefix, None, None
    )
    expected = model.state_dict()
    missing = [name for name in missing if has_head or name.startswith(f"{prefix}.")]
    if missing:
        raise InputError(
            f"{flag}: {folder} holds no weights for {len(missing)} of the {len(expected)} tensors that its config.json "
            f"asks for, such as {missing[0]}; copy or download it again"
        )
    used = [(tensor, expected[name]) for key, name in mapping.items() if name in expected and (tensor := stored[key])]
    for tensor, parameter in used:
        if tensor.shape != tuple(parameter.shape):
            sizes = " x ".join(map(str, tensor.shape)), " x ".join(map(str, parameter.shape))
            raise InputError(
                f"{flag}: {tensor.path}: {tensor.name} is {sizes[0]}, config.json makes it {sizes[1]}; they belong to "
                "two models"
            )
        if parameter.is_floating_point() and tensor.dtype not in FLOATS:
            raise InputError(
                f"{flag}: {tensor.path}: {tensor.name} is quantised ({tensor.dtype}), which is not trained or run "
                "here; give the model that it was made from"
            )
    kinds = {_without_numbers(name) for name in expected}
    beyond = [name for name in unexpected if _without_numbers(name) in kinds]
    if beyond:
        raise InputError(
            f"{flag}: {folder}/config.json leaves out {len(beyond)} tensors that the files hold, such as {beyond[0]}; "
            "it belongs to a smaller model"
        )
    if unexpected:
        logger.warning(
            f"{flag}: {len(unexpected)} tensors of {folder} are not part of a {config.model_type} model and are left "
            f"out, such as {unexpected[0]}"
        )
    return [tensor for tensor, _ in used]


def _without_numbers(name: str) -> str:
    return re.sub(r"\.\d+\.", ".0.", name)


def check_values(tensors: Sequence[StoredTensor], flag: str) -> None:
    """Refuses NaN and infinity, which training and generation would spread."""
    import torch

    from align.merge.arithmetic import is_finite

    floats = [tensor for tensor in tensors if tensor.dtype in FLOATS]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers are the threads
    pool = ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0))))
    try:
        for tensor, good in zip(floats, pool.map(is_finite, floats), strict=True):
            if not good:
                raise InputError(
                    f"{flag}: {tensor.path}: {tensor.name} holds NaN or infinity: did the run that wrote it diverge? "
                    "Give another model, or an earlier checkpoint"
                )
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
