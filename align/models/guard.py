"""Reads a model's folder before transformers does: what would run code, is damaged, or would be misread, is refused.

Every refusal is one line that names the flag, the file, and what to do. Heavy packages are imported where they are
used: run_generation.py and the merge check folders before they need them.
"""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import InputError
from align.merge.checkpoints import (
    FLOATS,
    Checkpoint,
    NotStreamableError,
    StoredTensor,
    find_folder,
    open_checkpoint,
    read_json,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py")  # all that a model has beside its weights
SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json")
SETTINGS += ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
PARTS_OF_A_DECODER = ("attn_config", "ffn_config")  # sub-configs that are no models: mpt's and dbrx's


# ---------------------------------------------------------------- code


def check_folder(folder: Path, flag: str, trust_remote_code: bool = False) -> None:
    """Refuses settings that make transformers 4.55 run code, or read other files than the ones that are checked here.

    `trust_remote_code` allows the code that comes with the model (`auto_map`), and no other.
    """
    for name in SETTINGS:
        path = folder / name
        if not path.exists() and not path.is_symlink():
            continue
        settings = read_json(path)
        _check_keys(path, settings, flag, trust_remote_code)
        if name == "config.json":
            _check_config(path, settings, flag)
    if (folder / "custom_generate" / "generate.py").exists() and not trust_remote_code:
        raise InputError(
            f"{flag}: {folder} brings code of its own to generate with (custom_generate); remove it, or add "
            "--trust_remote_code if you trust it"
        )
    if (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        # AutoModelForCausalLM would load the base that the adapter names, wherever that is.
        raise InputError(
            f"{flag}: {folder} holds a model and an adapter (adapter_config.json); keep them in two folders, or merge "
            "them with merge_peft_adapter.py"
        )


def _check_keys(path: Path, settings: dict, flag: str, trust_remote_code: bool) -> None:
    for place, key, value in _walk(settings):
        if not value:
            continue
        nested = f"{place}.{key}" if place else key
        if key == "auto_map" and not trust_remote_code:
            raise InputError(
                f"{flag}: {path} asks to run code that comes with it ({nested}: {_first_text(value)}); add "
                "--trust_remote_code if you trust it, or take that entry out to use the installed classes"
            )
        if key == "trust_remote_code" and not trust_remote_code:
            raise InputError(
                f"{flag}: {path} sets {nested} itself; take it out, or add --trust_remote_code if you trust its code"
            )
        if key in ("_name_or_path", "name_or_path") and place:
            # LightGlue's configuration loads it, code and all (CVE-2026-5241).
            raise InputError(f"{flag}: {path} leads to another model ({nested}: {value}); take that entry out")
        if key in ATTENTION_KEYS and any("/" in text for text in _texts(value)):
            raise InputError(
                f"{flag}: {path} asks for attention code from the hub ({nested}: {_first_text(value)}); take it out"
            )


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


def _walk(settings: Any, place: str = "") -> Iterator[tuple[str, str, Any]]:
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
    _check_keys(path, config, flag, trust_remote_code=False)
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


def load_config(folder: Path, flag: str, trust_remote_code: bool = False) -> "PretrainedConfig":
    """The configuration in a folder that `check_folder` has passed: that of a causal language model."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        hint = "; it holds an adapter: merge that one first" if (folder / "adapter_config.json").exists() else ""
        raise InputError(f"{flag}: no model at {folder}: there is no config.json{hint}")
    content = read_json(folder / "config.json")
    has_own_code = trust_remote_code and "AutoConfig" in (content.get("auto_map") or {})
    if not has_own_code:
        _check_kind(content, folder, flag)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a wrong value makes of a configuration's own code
        raise InputError(f"{flag}: {folder}/config.json cannot be used: {one_line(error)}") from error


def _check_kind(config: dict, folder: Path, flag: str) -> None:
    """Causal language models alone: other kinds have configurations that load more than themselves."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise InputError(f"{flag}: {folder}/config.json has no model_type; give the folder of a causal language model")
    if kind not in CONFIG_MAPPING:
        raise InputError(
            f"{flag}: {folder} is a {kind!r} model, which the installed transformers does not know; see docs for those "
            "that it does"
        )
    config_class = CONFIG_MAPPING[kind]
    others = {
        *modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    parts = set(getattr(config_class, "sub_configs", None) or ()) - set(PARTS_OF_A_DECODER)
    is_decoder = config_class in AutoModelForCausalLM._model_mapping and kind not in others and not parts
    if not is_decoder or config.get("is_encoder_decoder"):
        raise InputError(f"{flag}: {folder} is a {kind} model; give a causal language model, of text alone")


def load_tokenizer(folder: Path, flag: str, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer in a folder that `check_folder` has passed."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a damaged file makes of a tokenizer's own code
        raise InputError(f"{flag}: no tokenizer at {folder}: {one_line(error)}") from error


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
        logger.warning(f"{flag}: {folder} is not looked through before it is loaded: {reason}")
        return
    except InputError as error:
        raise InputError(f"{flag}: {error}") from None
    check_layers(checkpoint, config.to_dict(), flag)
    used = _match(checkpoint, config, flag, trust_remote_code, has_head)
    check_values(used[rank::ranks], flag)


def check_layers(checkpoint: Checkpoint, config: dict, flag: str) -> None:
    """Refuses files with fewer layers than the configuration, of which the others would be random numbers."""
    expected = next((config[name] for name in LAYER_COUNTS if isinstance(config.get(name), int)), None)
    held = {int(found[1]) for name in checkpoint.tensors if (found := LAYER.search(name))}
    if expected is not None and held and (missing := set(range(expected)) - held):
        raise InputError(
            f"{flag}: {checkpoint.folder}/config.json asks for {expected} layers, the files hold {len(held)}: there is "
            f"nothing of layer {min(missing)}; copy or download them again"
        )


def empty_model(config: "PretrainedConfig", trust_remote_code: bool = False) -> "PreTrainedModel":
    """The model of that configuration on the meta device: names and shapes, no memory."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import no_init_weights

    with torch.device("meta"), no_init_weights():
        if type(config) in AutoModelForCausalLM._model_mapping:
            # The class itself: from_config would shard it under ZeRO-3.
            model = AutoModelForCausalLM._model_mapping[type(config)](config)
        else:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        model.tie_weights()
    return model


def _match(
    checkpoint: Checkpoint, config: "PretrainedConfig", flag: str, trust_remote_code: bool, has_head: bool
) -> list[StoredTensor]:
    """The stored tensors that the model takes, by the rules that transformers 4.55 loads with."""
    from transformers.modeling_utils import _find_missing_and_unexpected_keys

    folder, stored = checkpoint.folder, checkpoint.tensors
    try:
        model = empty_model(config, trust_remote_code)
    except Exception as error:  # whatever a wrong size makes of a model's own code
        raise InputError(f"{flag}: {folder}/config.json makes no model: {one_line(error)}") from error
    prefix = model.base_model_prefix
    has_prefix, wants_prefix = any(name.startswith(prefix) for name in stored), hasattr(model, prefix)
    mapping = model._get_key_renaming_mapping(
        list(stored), None, has_prefix and not wants_prefix, wants_prefix and not has_prefix
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
            f"{flag}: {len(unexpected)} tensors of {folder} are no part of a {config.model_type} model and are left "
            f"out, such as {unexpected[0]}"
        )
    return [tensor for tensor, _ in used]


def _without_numbers(name: str) -> str:
    return re.sub(r"\.\d+\.", ".0.", name)


def check_values(tensors: Sequence[StoredTensor], flag: str) -> None:
    """Refuses NaN and infinity, of which training and generation would make more."""
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


def one_line(error: BaseException) -> str:
    """The first sentence of an error, which may be a page long or empty."""
    lines = str(error).strip().splitlines()
    return re.sub(r"\s+", " ", lines[0]) if lines else type(error).__name__
