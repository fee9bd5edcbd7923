"""Which tensors of a base model a LoRA adapter changes, and how: found from headers, before anything is computed."""

import itertools
import json
import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align.errors import InputError
from align.merge.checkpoints import (
    FLOATS,
    ITEM_SIZES,
    TORCH_NAMES,
    Checkpoint,
    NotStreamableError,
    StoredTensor,
    read_tensors,
    same_bytes,
)

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
ADAPTER_PART = re.compile(
    r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
)
TOKENS = ".token_adapter.trainable_tokens_delta"
# Prefixes that torch.compile, DDP, FSDP and checkpointing leave in the names of a saved adapter
INNER_WRAPPERS = r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
WRAPPERS = re.compile(rf"^(?:module\.|{INNER_WRAPPERS})+|(?<=\.){INNER_WRAPPERS}")
# Prefixes that a checkpoint of the bare model lacks (`base_model_prefix` in transformers), as gpt2 on the hub does
BASE_PREFIXES = ("transformer", "model", "gpt_neox", "backbone")
# All settings that PEFT 0.17 writes for LoRA; the code below reads those that matter for a merge
KNOWN_KEYS = set(
    "task_type peft_type auto_mapping base_model_name_or_path revision inference_mode r target_modules exclude_modules "
    "lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights layers_to_transform "
    "layers_pattern rank_pattern alpha_pattern megatron_config megatron_core trainable_token_indices loftq_config "
    "eva_config corda_config use_dora use_qalora qalora_group_size layer_replication runtime_config lora_bias "
    "target_parameters peft_version ensure_weight_tying arrow_config".split()
)
# Settings that decide how an adapter is merged: what each must be, in words and as a test
FLAG = "true or false", lambda value: value is None or isinstance(value, bool)
PATTERN = (
    "numbers other than 0 by module",
    lambda value: not value or (isinstance(value, dict) and _are_patterns(value)),
)
NAMES = "names of modules", lambda value: value is None or _are(str, value)
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "use_qalora"), FLAG),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), PATTERN),
    "r": ("a whole number above 0", lambda value: _is_number(value) and value > 0 and value % 1 == 0),
    "lora_alpha": ("a number other than 0", lambda value: _is_number(value) and value != 0),
    "bias": ("none, all or lora_only", lambda value: value in (None, "none", "all", "lora_only")),
    "modules_to_save": NAMES,
    "target_parameters": NAMES,
    **dict.fromkeys(
        ("target_modules", "exclude_modules"),
        ("names of modules or a pattern", lambda value: _is_pattern(value) or NAMES[1](value)),
    ),
    "init_lora_weights": ("true, false or a name", lambda value: value is None or isinstance(value, bool | str)),
    "task_type": ("a name", lambda value: value is None or isinstance(value, str)),
    "trainable_token_indices": (
        "numbers of tokens",
        lambda value: (
            not value or all(_are(int, each) for each in (value.values() if isinstance(value, dict) else [value]))
        ),
    ),
}
# Wrappers whose tensor is the base's own, shared by whatever is tied to it, as a resized embedding is.
BASE_WRAPPER = re.compile(r"\.(token_adapter\.base_layer|base_layer|original_module)(?=\.\w+$)")
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|(word_)?embeddings|embed_in|tokens_embed|tok_embeddings)\.weight$")
NAMED_HEADS = {
    **dict.fromkeys(("gpt_neox", "gpt_neox_japanese"), "embed_out.weight"),
    "rwkv": "head.weight",
    "biogpt": "output_projection.weight",
}
SHARED = ("zamba",)
# Types whose embedding scales what it looks up; PEFT 0.17 adds its adapter's part after that, and merges it before
SCALED = ("gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "xglm", "biogpt")
CLASSIFIERS = ("score", "classifier")
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
CONV1D_MODULES = ("c_attn", "q_attn", "c_proj", "c_fc")
HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal")  # the others change the base's weights too


@dataclass(frozen=True)
class Adapter:
    """
    A PEFT adapter on disk. `parts`: LoRA tensors by module and by the end of their name; `tokens`: retrained rows of
    an embedding by module; `values`: whole new tensors by the name of what they replace; `base_values`: the
    same, for what tied modules share.
    """

    folder: Path
    config: dict
    file: Path
    parts: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)
    tokens: dict[str, StoredTensor] = field(default_factory=dict)
    values: dict[str, StoredTensor] = field(default_factory=dict)
    base_values: dict[str, StoredTensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LoraUpdate:
    """
    `W += scaling * B @ A` for a weight, `b += scaling * B` for a bias (`a` is None).

    Shapes: `a` [rank, in], `b` [out, rank], the weight [out, in], `transposed` [in, out] (Conv1D, embeddings).
    `magnitude` [out] makes it DoRA: the updated weight, scaled to that norm. `rounded`: PEFT rounds an embedding's
    update to the weight's dtype before adding it.
    """

    b: StoredTensor
    scaling: float
    a: StoredTensor | None = None
    magnitude: StoredTensor | None = None
    transposed: bool = False
    rounded: bool = False


@dataclass(frozen=True)
class MergedTensor:
    """A tensor to write: `source` cast to `dtype`, rows replaced by `tokens` (numbers, values), then `update`."""

    name: str
    dtype: str
    source: StoredTensor
    tokens: tuple[tuple[int, ...], StoredTensor] | None = None
    update: LoraUpdate | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]

    @property
    def is_copy(self) -> bool:
        return self.dtype == self.source.dtype and not self.tokens and not self.update


@dataclass(frozen=True)
class MergePlan:
    """The files to write, each with its tensors in order, the model's configuration, and how many tokens it embeds."""

    files: dict[str, list[MergedTensor]]
    config: dict
    vocabulary: int | None

    @property
    def tensors(self) -> list[MergedTensor]:
        return [tensor for tensors in self.files.values() for tensor in tensors]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def find_adapter_file(folder: Path) -> Path:
    return next((folder / name for name in ADAPTER_FILES if (folder / name).exists()), folder / ADAPTER_FILES[0])


def open_adapter(folder: Path, config: dict) -> Adapter:
    """Sorts the tensors of the adapter in `folder`; raises NotStreamableError for what is not LoRA on plain layers."""
    file = find_adapter_file(folder)
    tensors = read_tensors(file)
    if not tensors:
        raise InputError(f"{file}: holds no tensor: save the adapter again")
    if "peft_type" not in config:
        raise InputError(f"{folder}/adapter_config.json has no peft_type, so it is not one that PEFT wrote")
    if config.get("layer_replication"):
        raise InputError(f"{folder}: has layer_replication, whose layers share weights and so cannot be merged")
    check_keys(folder, config)
    init = config.get("init_lora_weights")
    reasons = {
        f"the adapter is {config.get('peft_type')}, not LoRA": config.get("peft_type") != "LORA",
        "the adapter has target_parameters": config.get("target_parameters"),
        f"init_lora_weights={init} changes the base too": init not in HARMLESS_INITS,
        "the adapter was trained with Megatron": config.get("megatron_config"),
        "the adapter is QALoRA's": config.get("use_qalora"),
    }
    for reason, applies in reasons.items():
        if applies:
            raise NotStreamableError(reason)
    adapter = Adapter(folder, config, file)
    named: dict[str, StoredTensor] = {}
    for tensor in tensors:
        if 0 in tensor.shape:
            raise InputError(
                f"{file}: {tensor.name} is empty, as ZeRO-3 leaves what is saved without gathering: save it again"
            )
        if tensor.dtype not in FLOATS:
            raise InputError(f"{file}: {tensor.name} is {tensor.dtype}, not one of {', '.join(FLOATS)}: save it again")
        name = WRAPPERS.sub("", WRAPPERS.sub("", tensor.name).removeprefix("base_model.model."))
        if (other := named.setdefault(name, tensor)) is not tensor:
            raise InputError(f"{file}: {other.name} and {tensor.name} are for one place: save the adapter again")
        if part := ADAPTER_PART.fullmatch(name.removesuffix(".weight") if "magnitude" in name else name):
            adapter.parts.setdefault(part[1], {})[part[2]] = tensor
        elif name.endswith(TOKENS):
            adapter.tokens[name.removesuffix(TOKENS)] = tensor
        elif BASE_WRAPPER.search(name):
            adapter.base_values[BASE_WRAPPER.sub("", name)] = tensor
        else:
            adapter.values[name.replace(".modules_to_save.", ".")] = tensor
    return adapter


def check_keys(folder: Path, config: dict) -> None:
    """Refuses settings of a LoRA adapter that are unknown, or have other values than they can have."""
    if config.get("peft_type") == "LORA":
        refuse_unknown(folder, config, KNOWN_KEYS)
    for name, (wanted, fits) in KINDS.items() if config.get("peft_type") == "LORA" else ():
        if name in config and not fits(config[name]):
            raise InputError(
                f"{folder}/adapter_config.json: {name} is {json.dumps(config[name])[:60]}, not {wanted}; copy or "
                "download it again"
            )


def refuse_unknown(folder: Path, config: dict, known: Collection[str]) -> None:
    """Refuses settings of a newer PEFT that may change what the adapter means; settings that are off do not."""
    active = [name for name, value in config.items() if name not in known and value not in (None, False, [], {}, "")]
    if active:
        raise InputError(
            f"{folder}/adapter_config.json: {active[0]} is set, which PEFT 0.17 does not know, so the merged model "
            "might not be the one that was trained; merge it with the PEFT that wrote it"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _are_patterns(numbers: dict[str, Any]) -> bool:
    return all(_is_pattern(name) and _is_number(number) and number for name, number in numbers.items())


def _is_pattern(text: Any) -> bool:
    """The name of a module or a regular expression, as PEFT reads it."""
    try:
        return isinstance(text, str) and bool(re.compile(text))
    except re.error:
        return False


def plan_merge(base: Checkpoint, config: dict, adapter: Adapter, dtype: str | None) -> MergePlan:
    """
    Lays out the merged model in the base's files; raises InputError for an adapter that does not fit.

    `dtype` (safetensors' name) casts the base first, as loading it in that format would.
    """
    for tensor in base.tensors.values():
        if tensor.name.endswith("weight") and tensor.dtype not in FLOATS:
            raise InputError(f"{tensor.path}: {tensor.name} is {tensor.dtype}: give the unquantised model")
    return _Planner(base, dict(config), adapter, dtype).plan()


class _Planner:
    def __init__(self, base: Checkpoint, config: dict, adapter: Adapter, dtype: str | None):
        self.base, self.config, self.adapter, self.dtype = base, config, adapter, dtype
        stored = base.tensors
        self.head = NAMED_HEADS.get(str(config.get("model_type")), "lm_head.weight")
        self.prefix = prefix = self._missing_prefix(stored)
        self.tensors = {prefix + name: self._as_is(prefix + name, tensor) for name, tensor in stored.items()}
        self.file_of = {prefix + tensor.name: file for file, tensors in base.files.items() for tensor in tensors}
        self.embedding: Any = min(filter(EMBEDDING.search, self.tensors), key=len, default=None)
        self.float_dtype = self.tensors[self.embedding].dtype if self.embedding else dtype or "F32"

    def plan(self) -> MergePlan:
        vocabulary = self._rows(self.embedding)
        for name, value in self.adapter.base_values.items():
            self._replace(self.embedding if name == self.head and name not in self.tensors else name, value)
        for module, rows in self.adapter.tokens.items():
            self._retrain_tokens(module, rows)
        if self.adapter.config.get("task_type") == "SEQ_CLS":
            self._become_classifier()
        else:
            self._untie()
        for name, value in self.adapter.values.items():
            self._replace(name, value)
        for module, parts in self.adapter.parts.items():
            self._update(module, parts)
        resized = self._rows(self.embedding)
        if resized != vocabulary:
            self._set("vocab_size", resized)
            if self._rows(self.head) == vocabulary:
                raise InputError(
                    f"{self.adapter.file}: resizes {self.embedding} from {vocabulary} to {resized} rows, but not "
                    f"{self.head}: save the adapter with save_embedding_layers=True"
                )
        if self.dtype or "torch_dtype" in self.config:
            self.config.pop("dtype", None)  # transformers 5's name of it
        if self.dtype:
            self.config["torch_dtype"] = TORCH_NAMES[self.dtype]
        files = {file: [] for file in self.base.files}
        for name, tensor in self.tensors.items():
            files[self.file_of.get(name, list(files)[-1])].append(tensor)
        files = {_safetensors_name(file): tensors for file, tensors in files.items()}
        return MergePlan(files, self.config, resized)

    def _missing_prefix(self, stored: dict[str, StoredTensor]) -> str:
        """`transformer.` where the checkpoint was saved from the bare GPT2Model, as gpt2 on the hub was."""
        for module in self.adapter.parts if self.head not in stored else ():
            prefix, _, rest = module.partition(".")
            if f"{module}.weight" not in stored and f"{rest}.weight" in stored and prefix in BASE_PREFIXES:
                return f"{prefix}."
        return ""

    def _as_is(self, name: str, tensor: StoredTensor) -> MergedTensor:
        dtype = self.dtype if self.dtype and tensor.dtype in FLOATS else tensor.dtype
        return MergedTensor(name, dtype, tensor)

    def _set(self, name: str, value: Any) -> None:
        """In the configuration, and in that of the text of a model that sees pictures."""
        self.config[name] = value
        if isinstance(text := self.config.get("text_config"), dict):
            self.config["text_config"] = {**text, name: value}

    def _rows(self, name: str | None) -> int | None:
        return self.tensors[name].shape[0] if name in self.tensors else None

    def _replace(self, name: str, value: StoredTensor) -> None:
        """Takes `value` for the base's tensor. It may be new, or have other rows, only where training makes it so."""
        old = self.tensors.get(name)
        saved = self.adapter.config.get("modules_to_save") or []
        if old is None and not any(module in name.split(".") for module in saved):
            raise self._homeless(value)
        if old is not None and old.shape != value.shape:
            resized = name in (self.embedding, self.head) or name.split(".")[0] in CLASSIFIERS
            if not resized or old.shape[1:] != value.shape[1:]:
                raise self._misfit(value, old)
        self.tensors[name] = MergedTensor(name, old.dtype if old else self.float_dtype, value)

    def _retrain_tokens(self, module: str, values: StoredTensor) -> None:
        numbers = self.adapter.config.get("trainable_token_indices") or []
        if isinstance(numbers, dict):
            numbers = next((rows for name, rows in numbers.items() if f".{module}".endswith(f".{name}")), [])
        old = self.tensors.get(f"{module}.weight")
        if old is None:
            raise self._homeless(values)
        if values.shape != (len(numbers), *old.shape[1:]) or not all(0 <= row < old.shape[0] for row in numbers):
            raise self._misfit(values, old)
        self.tensors[old.name] = replace(old, tokens=(tuple(numbers), values))
        if old.name == self.embedding and self.head in self.tensors and self._stores_its_tied_head():
            self.tensors[self.head] = replace(self.tensors[self.head], tokens=(tuple(numbers), values))

    def _stores_its_tied_head(self) -> bool:
        tied = self.config.get("tie_word_embeddings")
        return bool(
            same_bytes(self.tensors[self.embedding].source, self.tensors[self.head].source) if tied is None else tied
        )

    def _become_classifier(self) -> None:
        """A causal base that an adapter turned into a classifier loses its language head and gets labels."""
        values = {name: value for name, value in self.adapter.values.items() if name.split(".")[0] in CLASSIFIERS}
        was = (self.config.get("architectures") or [""])[0]
        if not was.endswith("ForSequenceClassification"):
            if not values:
                raise InputError(
                    f"{self.adapter.file}: task_type is SEQ_CLS, but neither it nor the base has a score head"
                )
            name = re.sub("(ForCausalLM|LMHeadModel|Model)?$", "ForSequenceClassification", was, count=1)
            self.config["architectures"] = [name]
            self.tensors.pop(self.head, None)
        for name, value in values.items():
            self.tensors.setdefault(name, MergedTensor(name, self.float_dtype, value))
            labels = [f"LABEL_{number}" for number in range(value.shape[0])]
            known = self.config.get("id2label", {})
            if name.endswith(("score.weight", "classifier.weight")) and len(known) != len(labels):
                self.config["id2label"] = {str(number): label for number, label in enumerate(labels)}
                self.config["label2id"] = {label: number for number, label in enumerate(labels)}

    def _untie(self) -> None:
        """
        Where head and embedding are one tensor and the adapter changes one of them, writes two. PEFT's own merge
        changes both, and warns: its merged model is not the one that was trained.
        """
        both = (self.embedding, self.head)
        values: list[Any] = [self.adapter.values.get(name) for name in both]
        updated = any(str(name).removesuffix(".weight") in self.adapter.parts for name in both)
        task, architectures = self.adapter.config.get("task_type"), self.config.get("architectures")
        causal = task == "CAUSAL_LM" or re.search(
            "ForCausalLM|LMHeadModel|ForConditionalGeneration", str(architectures)
        )
        causal = causal or (not task and (self.prefix or not architectures))  # a prefix: more than the bare model
        if not (self.embedding and causal and (updated or any(values))):
            return
        tied = self.config.get("tie_word_embeddings") is True or self.head not in self.tensors
        if tied and not updated and all(values) and same_bytes(*values):
            del self.adapter.values[self.head]
            self.tensors.pop(self.head, None)
            return
        self._set("tie_word_embeddings", False)
        if tied:
            self.file_of[self.head] = self.file_of[self.embedding]
            self.tensors[self.head] = replace(self.tensors[self.embedding], name=self.head)

    def _update(self, module: str, parts: dict[str, StoredTensor]) -> None:
        embedding = "lora_embedding_A" in parts
        needed = ["lora_embedding_A", "lora_embedding_B"] if embedding else ["lora_A.weight", "lora_B.weight"]
        needed += ["lora_magnitude_vector"] if self.adapter.config.get("use_dora") else []
        needed += ["lora_B.bias"] if self.adapter.config.get("lora_bias") else []
        if self.adapter.config.get("target_modules") and not is_target(module, self.adapter.config):
            raise InputError(
                f"{self.adapter.file}: changes {module}, which target_modules of its adapter_config.json do not name: "
                "these files are not of one adapter"
            )
        if more := set(parts) - set(needed):
            raise InputError(
                f"{self.adapter.file}: {parts[min(more)].name} is not what its adapter_config.json says (use_dora, "
                "lora_bias): these files are not of one adapter"
            )
        if missing := set(needed) - set(parts):
            raise InputError(f"{self.adapter.file}: {module} has no {min(missing)}: save the adapter again")
        a, b, magnitude = parts[needed[0]], parts[needed[1]], parts.get("lora_magnitude_vector")
        weight = self.tensors.get(f"{module}.weight")
        if weight is None:
            raise self._homeless(a)
        if len(a.shape) > 2 and len(b.shape) > 2:
            raise NotStreamableError(f"{module} is a convolution")
        for each in (a, b):
            if len(each.shape) != 2:
                raise InputError(f"{self.adapter.file}: {each.name} {list(each.shape)} is no matrix: save it again")
        scaling = self._scaling(module, a, b)
        shape = (b.shape[0], a.shape[1])
        conv1d = self.config.get("model_type") in CONV1D_MODELS and module.split(".")[-1] in CONV1D_MODULES
        transposed = embedding or conv1d
        if weight.shape != (shape[::-1] if transposed else shape):
            raise self._misfit(b if weight.shape[-1:] == a.shape[1:] else a, weight)
        if magnitude is not None and math.prod(magnitude.shape) != shape[0]:
            raise self._misfit(magnitude, weight)
        update = LoraUpdate(b, scaling, a, magnitude, transposed, rounded=embedding and magnitude is None)
        self.tensors[weight.name] = replace(weight, update=update)
        if "lora_B.bias" in parts:
            bias = self.tensors.get(f"{module}.bias")
            if bias is None or bias.shape != parts["lora_B.bias"].shape:
                raise self._homeless(parts["lora_B.bias"])
            self.tensors[bias.name] = replace(bias, update=LoraUpdate(parts["lora_B.bias"], scaling))

    def _scaling(self, module: str, a: StoredTensor, b: StoredTensor) -> float:
        """alpha / rank, by the patterns in the adapter's configuration, whose first match counts."""

        def setting(default: str, patterns: str) -> float:
            for pattern, value in (self.adapter.config.get(patterns) or {}).items():
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            return self.adapter.config.get(default, 8)  # as in PEFT's LoraConfig

        rank, alpha = setting("r", "rank_pattern"), setting("lora_alpha", "alpha_pattern")
        for tensor, found in ((a, a.shape[0]), (b, b.shape[1])):
            if found != rank:
                raise InputError(
                    f"{self.adapter.file}: {tensor.name} has rank {found}, adapter_config.json says {rank}: "
                    "these files are not of one adapter"
                )
        return alpha / (math.sqrt(rank) if self.adapter.config.get("use_rslora") else rank)

    def _homeless(self, tensor: StoredTensor) -> Exception:
        if {"text_config", "vision_config"} & self.config.keys():
            return NotStreamableError(f"the names in {self.base.folder} may not be those of the model's modules")
        if self.config.get("model_type") in SHARED:
            return NotStreamableError(f"layers of {self.config['model_type']} models share what is stored once")
        return InputError(
            f"{self.adapter.file}: {tensor.name} finds no place in {self.base.folder} "
            f"({self.config.get('model_type')}): the adapter is for another model or architecture"
        )

    def _misfit(self, tensor: StoredTensor, target: MergedTensor) -> InputError:
        return InputError(
            f"{self.adapter.file}: {tensor.name} {list(tensor.shape)} does not fit {target.name} {list(target.shape)} "
            f"of {self.base.folder}: the adapter is for another model"
        )


def is_target(module: str, config: dict) -> bool:
    """Whether `target_modules`, names or a pattern, name that module, as in PEFT."""
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        return targets == "all-linear" or bool(re.fullmatch(targets, module))
    return any(f".{module}".endswith(f".{name}") for name in targets)


def find_untouched(plan: MergePlan, adapter: Adapter) -> list[str]:
    """Modules that `target_modules` names and no tensor of the adapter changes; a whole adapter leaves none."""
    config = adapter.config
    limited = any(config.get(name) for name in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    if config.get("target_modules") == "all-linear" or limited:
        return []
    untouched = [
        tensor.name.removesuffix(".weight")
        for tensor in plan.tensors
        if tensor.name.endswith(".weight") and len(tensor.shape) == 2
        if not tensor.update and tensor.source.path != adapter.file
    ]
    return [module for module in untouched if is_target(module, config)]


def find_missing(plan: MergePlan, adapter: Adapter) -> list[str]:
    """What the adapter's configuration says was trained beside LoRA, and its file does not hold."""
    held = [f".{tensor.name}" for tensor in read_tensors(adapter.file)]
    base = [f".{tensor.name}" for tensor in plan.tensors]
    heads = [f".{name}." for name in ("lm_head", "embed_out")]  # which a tied base does not store
    saved = [f".{module}." for module in adapter.config.get("modules_to_save") or []]
    missing = [
        module.strip(".")
        for module in saved
        if not any(module in name for name in held) and (module in heads or any(module in name for name in base))
    ]
    if adapter.config.get("trainable_token_indices") and not adapter.tokens:
        missing.append("rows of tokens (trainable_token_indices)")
    biases = [f".{module}.bias" for module in adapter.parts]
    trained = {"all": [name for name in base if name.endswith(".bias")], "lora_only": biases}
    wanted = set(trained.get(str(adapter.config.get("bias")), ())) & set(base)
    if wanted and not any(name.endswith(tuple(wanted)) for name in held):
        missing.append(f"biases (bias {adapter.config['bias']})")
    return missing


def find_zeros(adapter: Adapter) -> list[str]:
    """Modules whose update is zero, as that of a LoRA adapter is before its first step."""
    if adapter.config.get("use_dora"):
        return []
    kinds = ("lora_B.weight", "lora_embedding_B", "lora_A.weight", "lora_embedding_A")
    return [
        module
        for module, parts in adapter.parts.items()
        if "lora_B.bias" not in parts and any(_is_zero(parts[kind]) for kind in kinds if kind in parts)
    ]


def _is_zero(tensor: StoredTensor) -> bool:
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        sizes = itertools.chain(itertools.repeat(1 << 20, tensor.nbytes >> 20), [tensor.nbytes % (1 << 20)])
        return all(file.read(size).count(0) == size for size in sizes)


def _safetensors_name(file: str) -> str:
    return f"{Path(file).stem.replace('pytorch_model', 'model')}.safetensors"
