"""Loads tokenizer and model, and says before that which modules LoRA will train."""

import inspect
import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

from align.data.chats import ChatTemplate
from align.data.tokenization import set_chat_template
from align.errors import InputError, one_line
from align.models import guard
from align.models.families import (
    FAMILIES,
    Family,
    check_attention,
    check_flash_attention,
    choose_class,
    is_exact_in_fused_kernel,
    log_class,
)
from align.upstream_fixes import (
    keep_frequencies,
    keep_no_input_of_frozen_layers,
    keep_out_of_autocast,
    keep_ranks_apart,
    mend_transformers,
)

logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """Which model to start from."""

    _argument_group_name = "Model"

    model_name_or_path: str | None = field(default=None, metadata={"help": "Model: a folder or a hub name."})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer: a folder or a hub name (default: the model's)."}
    )
    torch_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type of the loaded weights (default: bfloat16 where they stay frozen or DeepSpeed keeps a float32 "
            "copy, else float32).",
            "choices": ["bfloat16", "float32"],
        },
    )
    use_flash_attention: bool | None = field(
        default=None,
        metadata={
            "help": "Use Gaudi's fused attention (default: where it is exact, and with --flash_attention_recompute)."
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    token: str | None = field(default=None, metadata={"help": "Token for the hub (default: the one of the login)."})


@dataclass
class LoraArguments:
    """Which part of it to train."""

    _argument_group_name = "LoRA"

    use_peft: bool = field(default=True, metadata={"help": "Train a LoRA adapter; False trains all weights."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: float = field(default=16, metadata={"help": "Scale of the adapter: alpha / rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter, 0 to 1."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules with an adapter: names, a regular expression or `all-linear` (default: PEFT's for the "
            "model)."
        },
    )


def check_attention_flags(args: ModelArguments, training_args) -> None:
    for mode in ("flash_attention_recompute", "flash_attention_causal_mask", "flash_attention_fast_softmax"):
        if getattr(training_args, mode) and args.use_flash_attention is False:
            raise InputError(f"--{mode}: is a mode of flash attention; leave --use_flash_attention False out")


def load_config(args: ModelArguments, flag: str = "--model_name_or_path") -> PretrainedConfig:
    if args.model_name_or_path is None:
        raise InputError("--model_name_or_path: missing; give a folder or a hub name")
    folder = guard.find_model(args.model_name_or_path, flag, args.trust_remote_code, args.token)
    return guard.load_config(folder, flag, args.trust_remote_code)


def load_tokenizer(args: ModelArguments, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    name = args.tokenizer_name_or_path or args.model_name_or_path or ""
    flag = "--tokenizer_name_or_path" if args.tokenizer_name_or_path else "--model_name_or_path"
    folder = guard.find_model(name, flag, args.trust_remote_code, args.token)
    tokenizer = guard.load_tokenizer(folder, flag, args.trust_remote_code)
    set_chat_template(tokenizer, chat_template)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Refuses ids without a row in the embedding; warns of end tokens that are not the model's."""
    highest, rows = max(tokenizer.get_vocab().values()), config.get_text_config().vocab_size
    if highest >= rows:
        raise InputError(
            f"--tokenizer_name_or_path: its ids go up to {highest}, the model's embedding has {rows} rows; "
            "use the model's own tokenizer"
        )
    ends = _find_ends(config)
    if ends and tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        logger.warning(
            f"the tokenizer ends a text with {tokenizer.eos_token!r} (its eos_token), which every answer learns as its "
            f"end, but the model's texts end with {tokenizer.convert_ids_to_tokens(ends)} (its eos_token_id)"
        )
    template = ChatTemplate(tokenizer)
    if template.writes_date:
        logger.warning(
            "the chat template writes today's date: rows keep the date on which they were tokenised, also in the "
            "cache; a model that is asked later sees another one"
        )
    turn = template.find_end() if tokenizer.chat_template else None
    if tokenizer.chat_template and turn is None:
        logger.info(
            "the chat template ends the assistant's turns without a special token: only the last turn of a chat "
            f"teaches the model to stop, with {tokenizer.eos_token!r}"
        )
    if turn and turn != tokenizer.eos_token:
        logger.info(
            f"the chat template ends a turn with {turn!r}, the tokenizer a text with {tokenizer.eos_token!r}; answers "
            "learn both, in this order"
        )


def find_padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills rows up: the tokenizer's own, else its EOS, as padding is masked anyway."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _find_ends(config: PretrainedConfig) -> list[int]:
    """Ids that end the model's texts, by its config and by generation_config.json beside it."""
    found = [config.eos_token_id]
    beside = Path(config.name_or_path) / "generation_config.json"
    if beside.is_file():
        found.append(json.loads(beside.read_text(encoding="utf-8")).get("eos_token_id"))
    ends = {end for each in found for end in (each if isinstance(each, list) else [each])}
    return sorted(ends - {None})


def lora_config(args: LoraArguments, config: PretrainedConfig, trust_remote_code: bool = False) -> LoraConfig | None:
    """The adapter that the flags ask for, checked against the model's modules without loading a weight.

    Targets that match nothing are named in a warning and left out; if none matches it is an error.
    """
    if not args.use_peft:
        return None
    model = guard.empty_model(config, "--model_name_or_path", trust_remote_code)
    modules = _linear_modules(model)
    leaves = ", ".join(sorted({name.rpartition(".")[2] for name in modules}))
    targets = args.lora_target_modules or TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(config.model_type)
    if targets is None:
        raise InputError(f"--lora_target_modules: PEFT knows no default for {config.model_type}; choose from {leaves}")
    others = [target for target in targets if not _is_name(target)]
    if others and len(targets) > 1:  # PEFT takes every entry of a list for a name
        raise InputError(
            f"--lora_target_modules: {others[0]!r} is not a module's name; give names, or one regular expression "
            "alone, or all-linear alone"
        )
    live = [target for target in targets if any(_matches(target, name) for name in modules)]
    dead = [target for target in targets if target not in live]
    if not live:
        raise InputError(
            f"--lora_target_modules: none of {', '.join(dead)} is a module of this {config.model_type} model; "
            f"its linear modules are {leaves}"
        )
    if dead:
        logger.warning(
            f"--lora_target_modules: {', '.join(dead)} match no module of this {config.model_type} model and are left "
            f"out; its linear modules are {leaves}"
        )
    found = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=live[0] if len(live) == 1 and not _is_name(live[0]) else live,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        inject_adapter_in_model(found, model, low_cpu_mem_usage=True)
    except ValueError as error:
        raise InputError(f"--lora_target_modules: {one_line(error)}; the linear modules are {leaves}") from error
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if scaled := [name for name, module in adapted.items() if hasattr(module.get_base_layer(), "embed_scale")]:
        raise InputError(
            f"--lora_target_modules: {scaled[0]} of this {config.model_type} model scales what it looks up, which PEFT "
            "0.17 leaves out while it trains: the merged model would be another one; leave it out"
        )
    return found


def _is_name(target: str) -> bool:
    return re.fullmatch(r"[\w.]+", target) is not None


def _matches(target: str, module: str) -> bool:
    """As PEFT matches: a name is the end of a module's path, anything else a regular expression for all of it."""
    if target == "all-linear":
        return True
    if _is_name(target):
        return module == target or module.endswith("." + target)
    try:
        return re.fullmatch(target, module) is not None
    except re.error as error:
        raise InputError(f"--lora_target_modules: {target!r} is not a regular expression: {error}") from error


def _linear_modules(model: PreTrainedModel) -> list[str]:
    """Paths of the modules that LoRA can adapt."""
    kinds = (torch.nn.Linear, torch.nn.Embedding, Conv1D)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def check_weights(args: ModelArguments, training_args, config: PretrainedConfig, flag: str) -> None:
    """Refuses, before anything is loaded, files of a model that are not whole, not its own, or hold NaN."""
    folder = guard.find_weights(args.model_name_or_path or "", flag, args.token)
    ranks = training_args.process_index, training_args.world_size
    guard.check_weights(folder, config, flag, args.trust_remote_code, *ranks)


def load_model(
    args: ModelArguments,
    training_args,
    config: PretrainedConfig,
    frozen: bool,
    longest: int,
    flag: str = "--model_name_or_path",
) -> PreTrainedModel:
    """Loads the model that `flag` names; `frozen` says that its own weights are not trained.

    `longest` is the most tokens of a text: optimum-habana's classes know no windows that are shorter.

    Under ZeRO-3 each rank holds its part alone. Blocks that route tokens to experts become ZeRO-3 leaves. Gathered
    expert by expert, ranks that route differently would wait for each other forever.
    """
    if is_deepspeed_zero3_enabled():
        keep_no_input_of_frozen_layers()
    in_bfloat16 = training_args.bf16 and (frozen or training_args.deepspeed is not None)
    dtype = args.torch_dtype or ("bfloat16" if in_bfloat16 else "float32")
    name = args.model_name_or_path
    check_attention(config, training_args.attn_implementation)
    log_class(config, longest)
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False
        logger.warning(
            f"{flag}: config.json of {name} sets output_router_logits; the loss of the experts' balance that it "
            "asks for is not added here, the loss is that of the tokens alone"
        )
    mend_transformers()
    try:
        model, loaded = choose_class(config, longest).from_pretrained(
            name,
            config=config,
            torch_dtype=getattr(torch, dtype),
            attn_implementation=training_args.attn_implementation,
            token=args.token,
            revision=config._commit_hash,  # what was checked; None for a folder
            trust_remote_code=args.trust_remote_code,
            output_loading_info=True,
        )
    except KeyError as error:
        if error.args != (training_args.attn_implementation,):
            raise
        raise InputError(
            f"--attn_implementation {error.args[0]}: {config.model_type} models have none; leave it out"
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{flag}: {name} cannot be loaded: {one_line(error)}") from error
    if loaded["missing_keys"]:  # of a format that the guard does not read
        raise InputError(f"{flag}: {name} holds no weights for {sorted(loaded['missing_keys'])[0]}")
    guard.mend_generation_config(model, flag)
    if wants_flash_attention(args, config, longest):
        set_attention_inputs(model, args, training_args)
    if is_deepspeed_zero3_enabled() and (training_args.use_zero3_leaf_promotion or _has_experts(config)):
        from optimum.habana.distributed import apply_zero3_leaf_promotion

        apply_zero3_leaf_promotion(model)
    keep_ranks_apart(model)
    keep_out_of_autocast(model)
    keep_frequencies(model)
    return model


def wants_flash_attention(args: ModelArguments, config: PretrainedConfig, longest: int) -> bool:
    """What --use_flash_attention says; where it is not given, whether the kernel is exact."""
    wanted = args.use_flash_attention
    return is_exact_in_fused_kernel(config, longest) if wanted is None else wanted


def set_attention_inputs(model: PreTrainedModel, args: ModelArguments, training_args) -> None:
    """Stores with the model what its forward is given for Gaudi's fused attention."""
    check_flash_attention(model)
    by_default, kind = args.use_flash_attention is None, model.config.model_type
    fast = training_args.flash_attention_fast_softmax  # has no gradients with recompute (folders.py)
    wanted = {
        "use_flash_attention": True,
        "flash_attention_recompute": training_args.flash_attention_recompute or (by_default and not fast),
        "flash_attention_causal_mask": training_args.flash_attention_causal_mask,
    }
    taken = inspect.signature(type(model).forward).parameters
    model.attention_inputs = {name: True for name, value in wanted.items() if value and name in taken}
    if by_default:
        logger.info(
            "attention: Gaudi's fused kernel, which computes its softmax again for the gradients "
            "(--use_flash_attention False for optimum-habana's default)"
        )
    elif "use_flash_attention" not in taken and not FAMILIES.get(kind, Family()).always_fused:
        logger.warning(f"--use_flash_attention has no effect: {kind} runs here without that kernel")
    elif dropout := getattr(model.config, "attention_dropout", 0):
        logger.warning(f"--use_flash_attention leaves out the dropout of attention ({dropout:g} in {kind}'s config)")


def _has_experts(config: PretrainedConfig) -> bool:
    return any(getattr(config, name, 0) for name in ("num_local_experts", "num_experts"))
