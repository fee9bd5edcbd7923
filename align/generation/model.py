"""The model on its card, or each rank's part of it: folders, weights, adapter, tensor parallelism.

Heavy packages are imported where they are used: imports are most of the time to the first word.
"""

import contextlib
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from align.errors import InputError, one_line
from align.merge.checkpoints import NotStreamableError, find_folder, open_checkpoint, read_tensors
from align.merge.plan import find_adapter_file
from align.models import guard
from align.quiet import quiet_imports

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

OF_PROMPTS = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")
SAVED = ".modules_to_save."  # in the name of a weight that an adapter replaces
SWITCH = {"nargs": "?", "const": True}  # of a flag that has no value, or True or False


@dataclass
class ModelArguments:
    _argument_group_name = "Model"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model folder or hub name (default: the base that --peft_model names)."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer: a folder or hub name (default: the adapter's, else the model's)."}
    )
    peft_model: str | None = field(
        default=None, metadata={"help": "Adapter folder or hub name, folded into the model in memory."}
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a model from the hub (default: its main branch)."}
    )
    token: str | None = field(default=None, metadata={"help": "Token for the hub (default: the one of the login)."})
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Compute in bfloat16, not float32 (default: with several cards).", **SWITCH},
    )
    sdp_on_bf16: bool = field(
        default=False, metadata={"help": "Let torch's own attention sum up in bfloat16 where its inputs are."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    trust_remote_code_tokenizer: bool = field(
        default=False, metadata={"help": "Run code that comes with the tokenizer, but not the model's."}
    )
    skip_probe: bool = field(
        default=False, metadata={"help": "Do not test whether padding and cache change what the loaded model says."}
    )


def uses_bf16(arguments: ModelArguments, world_size: int) -> bool:
    """What --bf16 says; several cards take bfloat16 by themselves, as models that need them do."""
    if arguments.bf16 is None and world_size > 1:
        logger.warning(f"{world_size} cards compute in bfloat16; --bf16 False gives float32.")
        return True
    return bool(arguments.bf16)


@dataclass(frozen=True)
class Flags:
    """The flags that have named a model and its adapter, to blame in messages."""

    model: str = "--model_name_or_path"
    adapter: str = "--peft_model"


@dataclass(frozen=True)
class Source:
    """A model as its small files describe it, before a weight is loaded."""

    arguments: ModelArguments
    flags: Flags
    folder: Path
    tokenizer_folder: Path
    adapter: Path | None
    config: "PretrainedConfig"
    tokenizer: "PreTrainedTokenizerBase"

    @property
    def vocabulary_size(self) -> int:
        """The model's, or that of an adapter that brought new tokens."""
        return max(self.config.vocab_size, len(self.tokenizer) if self.adapter else 0)

    @property
    def context(self) -> int:
        """The most tokens of a text."""
        from align.models.families import find_context

        return find_context(self.config) or sys.maxsize

    def ignores_padding(self, batch_size: int) -> bool:
        """Whether layers take padding for a part of the text, as those with a state do where a batch has one row."""
        from align.models.families import IGNORE_PADDING, STATEFUL

        return self.config.model_type in (STATEFUL if batch_size == 1 else IGNORE_PADDING)

    @property
    def folders(self) -> dict[str, Path | None]:
        """By the flags that name them."""
        return {
            "model_name_or_path": self.folder,
            "tokenizer_name_or_path": self.tokenizer_folder,
            "peft_model": self.adapter,
        }


def find_source(arguments: ModelArguments, world_size: int = 1, flags: Flags = Flags()) -> Source:
    """The model that is asked for, from the hub where it is not local; refuses one that the ranks cannot share."""
    folder, tokenizer_folder, adapter = find_folders(arguments, flags)
    trust = arguments.trust_remote_code
    trust_tokenizer = trust or arguments.trust_remote_code_tokenizer
    flag = flags.adapter if tokenizer_folder == adapter else flags.model
    flag = "--tokenizer_name_or_path" if arguments.tokenizer_name_or_path else flag
    guard.check_folder(tokenizer_folder, flag, trust_tokenizer)
    config = guard.load_config(folder, flags.model, trust)
    tokenizer = guard.load_tokenizer(tokenizer_folder, flag, trust_tokenizer)
    check_shares(config, world_size)
    return Source(arguments, flags, folder, tokenizer_folder, adapter, config, tokenizer)


def check_shares(config: "PretrainedConfig", world_size: int) -> None:
    """Refuses a number of cards that cannot share the heads of attention evenly."""
    from align.models.families import find_split_fault

    if world_size == 1 or find_split_fault(config):
        return
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if heads % world_size:
        raise InputError(f"gaudi_spawn.py --world_size: {world_size} cards cannot share {heads} key/value heads evenly")


def find_folders(arguments: ModelArguments, flags: Flags) -> tuple[Path, Path, Path | None]:
    """Folders of model, tokenizer and adapter; the model's files are whole.

    The model that is not named is the one that the adapter was trained on. The tokenizer that is not named is the
    adapter's, which may have new tokens, else the model's.
    """
    name, token = arguments.model_name_or_path, arguments.token
    peft_model, revision = arguments.peft_model, arguments.model_revision
    patterns = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.safetensors")
    adapter = peft_model and find_folder(peft_model, flags.adapter, *patterns, "adapter_model.bin", token=token)
    if adapter:
        settings = guard.check_adapter(adapter, flags.adapter)
        if settings.get("peft_type") in OF_PROMPTS:
            raise InputError(
                f"{flags.adapter}: {adapter} is a {settings['peft_type']} adapter, which changes no weights but needs "
                "tokens of its own in front of every prompt; only adapters that can be merged run here, such as LoRA"
            )
        name = name or settings.get("base_model_name_or_path")
    if not name:
        raise InputError(f"--model_name_or_path: missing, and {flags.adapter} {peft_model} names no base; give one")
    if revision not in (None, "main") and Path(name).is_dir():
        raise InputError(f"--model_revision: {name} is a folder, which has one revision; leave it out")
    hub = {"revision": revision, "token": token}
    trust, trust_tokenizer = arguments.trust_remote_code, arguments.trust_remote_code_tokenizer
    folder = find_folder(name, flags.model, *patterns[:-1], **hub)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise InputError(f"{flags.model}: {folder} is an adapter; give it as --peft_model, or merge it first")
    guard.check_folder(folder, flags.model, trust, trust or trust_tokenizer)  # before it fetches weights
    folder = find_folder(name, flags.model, *patterns, **hub)
    if not any(folder.glob("*.safetensors")):
        folder = find_folder(name, flags.model, *patterns, "*.bin", **hub)
    with contextlib.suppress(NotStreamableError):  # which torch can load all the same
        open_checkpoint(folder)
    if named := arguments.tokenizer_name_or_path:
        tokenizer = find_folder(named, "--tokenizer_name_or_path", *patterns[:-1], token=token)
    else:
        tokenizer = adapter if adapter and (adapter / "tokenizer_config.json").exists() else folder
    return folder, tokenizer, adapter or None


def load_model(
    folder: Path,
    adapter: Path | None,
    vocabulary_size: int,
    arguments: ModelArguments,
    world_size: int,
    use_hpu_graphs: bool,
    longest: int,
    rank: int = 0,
    plain_class: bool = False,
    flags: Flags = Flags(),
) -> "PreTrainedModel":
    """The model on its card, or each rank's part of it; an adapter is folded in in memory, nothing is written.

    Ranks map the same safetensors file, so a host holds one copy of the model while they cut out their parts.
    `longest` is the most tokens of a prompt with its answer, which decides the class; `plain_class` is transformers'.
    """
    import torch

    import habana_frameworks.torch  # noqa: F401 - in lazy mode torch does not load the plugin by itself
    from align.models.families import choose_class, log_class
    from align.upstream_fixes import keep_frequencies, transformers_class

    config = guard.load_config(folder, flags.model, arguments.trust_remote_code)
    guard.check_weights(folder, config, flags.model, arguments.trust_remote_code, rank, world_size)
    if adapter is not None:
        guard.check_values(read_tensors(find_adapter_file(adapter)), flags.adapter)
    dtype = torch.bfloat16 if uses_bf16(arguments, world_size) else torch.float32
    if arguments.sdp_on_bf16:
        torch._C._set_math_sdp_allow_fp16_bf16_reduction(True)
    if plain_class:
        model_class = transformers_class(config.model_type)
    else:
        model_class = choose_class(config, longest, world_size > 1)
        log_class(config, longest, world_size > 1)
    try:  # eager still runs the fused kernel; Mixtral's sdpa is not causal without padding
        model, loaded = model_class.from_pretrained(
            folder,
            config=config,
            torch_dtype=dtype,
            attn_implementation="eager",
            trust_remote_code=arguments.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{flags.model}: {folder} cannot be loaded: {one_line(error)}") from error
    if loaded["missing_keys"]:
        raise InputError(f"{flags.model}: {folder} holds no weights for {sorted(loaded['missing_keys'])[0]}")
    keep_frequencies(model)
    if adapter is not None:
        if vocabulary_size > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(vocabulary_size)
        model = _fold_adapter(model, adapter, flags.adapter)
    model = model.eval()
    model = _split(model, dtype, world_size) if world_size > 1 else model.to(torch.device("hpu"))
    if use_hpu_graphs:  # the name is not there in eager mode
        from habana_frameworks.torch.hpu import wrap_in_hpu_graph

        model = wrap_in_hpu_graph(model)
    return model


def _fold_adapter(model: "PreTrainedModel", adapter: Path, flag: str) -> "PreTrainedModel":
    from peft import PeftConfig, get_peft_model
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    from align.merge.writing import merge_as_trained

    dtype = model.dtype
    try:
        adapted = get_peft_model(model, PeftConfig.from_pretrained(adapter), autocast_adapter_dtype=False)
        weights = load_peft_weights(adapter, device="cpu")
        twice = [name for name in weights if SAVED in name and name.replace(SAVED, ".") in weights]
        for name in twice:  # PEFT 0.17 saves a resized embedding that is trained whole under both names
            del weights[name]
        loaded = set_peft_model_state_dict(adapted, weights)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{flag}: {adapter} does not fit the model: {one_line(error)}") from error
    if loaded.unexpected_keys:
        raise InputError(f"{flag}: {adapter} does not fit the model: it has no {loaded.unexpected_keys[0]}")
    return merge_as_trained(adapted).to(dtype)


def _split(model: "PreTrainedModel", dtype: "torch.dtype", world_size: int) -> "PreTrainedModel":
    """This rank's part of the model under DeepSpeed's tensor parallelism."""
    import torch

    from align.models.families import find_split_fault

    with quiet_imports():
        import deepspeed
        from optimum.habana.checkpoint_utils import get_ds_injection_policy

    whole = model.num_parameters()
    if fault := find_split_fault(model.config):
        logger.warning(f"Each card holds the whole {model.config.model_type} model: split over cards it {fault}.")
        deepspeed.init_distributed()
        return model.to(torch.device("hpu"))
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints the layers it found
        engine = deepspeed.init_inference(
            model,
            dtype=dtype,
            tensor_parallel={"tp_size": world_size, "tp_grain_size": 1},
            injection_policy=get_ds_injection_policy(model.config),
        )
    if engine.module.num_parameters() >= whole:
        logger.warning(f"DeepSpeed splits no {model.config.model_type} model: each card holds all of it.")
    return engine.module
