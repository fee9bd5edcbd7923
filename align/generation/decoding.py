"""Prompts in, text out: static shapes, end tokens, streaming and timing around optimum-habana's generation loop.

Heavy packages are imported where they are used: imports are most of the time to the first word.
"""

import contextlib
import json
import logging
import sys
import time
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align.errors import InputError
from align.merge.checkpoints import NotStreamableError, find_folder, open_checkpoint, read_json

if TYPE_CHECKING:
    import torch
    from optimum.habana.transformers.generation import GaudiGenerationConfig
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MIN_WIDTH = 16  # tokens: prompts that are all shorter count as one width
WIDTH_CHOICES = 256  # the finest grid that widths are chosen from, as the choice takes its square in memory
STEPS_PER_CHECK = 8  # the end tokens are looked for this often: each look waits for the device


# ---------------------------------------------------------------- prompts


def read_prompts(
    prompt: list[str] | None = None,
    prompt_file: str | None = None,
    dataset_name: str | None = None,
    dataset_split: str = "train",
    column_name: str = "prompt",
) -> list[str]:
    """The prompts in the user's order, from the one source that was given, or one a line from a pipe on stdin."""
    given = [
        flag
        for flag, value in (("--prompt", prompt), ("--prompt_file", prompt_file), ("--dataset_name", dataset_name))
        if value is not None
    ]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)}: give only one source of prompts")
    if prompt is not None:
        source, prompts = "--prompt", prompt
    elif prompt_file is not None:
        source = f"--prompt_file {prompt_file}"
        prompts = _read_prompt_file(Path(prompt_file), column_name)
    elif dataset_name is not None:
        source = f"--dataset_name {dataset_name}"
        prompts = _read_prompt_column(dataset_name, dataset_split, column_name)
    elif sys.stdin.isatty():
        raise InputError("no prompt: give --prompt, --prompt_file or --dataset_name, or pipe one prompt a line")
    else:
        source, prompts = "stdin", [line for line in sys.stdin.read().split("\n") if line.strip()]
    if not prompts:
        raise InputError(f"{source}: holds no prompt")
    return prompts


def _read_prompt_file(path: Path, column_name: str) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines, which knows ten more ends of a line
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompt_file {path}: cannot be read as UTF-8 text: {error}") from error
    if path.suffix != ".jsonl":
        return [line for line in lines if line.strip()]
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"--prompt_file {path}, row {number}: is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"--prompt_file {path}, row {number}: got {line[:40]!r}, not an object with columns")
        prompts.append(_prompt_of(row, column_name, f"--prompt_file {path}, row {number}"))
    return prompts


def _read_prompt_column(dataset_name: str, split: str, column_name: str) -> list[str]:
    from align.data.loading import DataArguments, load_splits

    arguments = DataArguments(dataset_name=dataset_name, split=split, streaming=False)
    rows = load_splits(arguments, do_train=True, do_eval=False, streams=False, seed=0, folder="").train
    return [_prompt_of(row, column_name, f"--dataset_name {dataset_name}, row {n}") for n, row in enumerate(rows, 1)]


def _prompt_of(row: dict[str, Any], column_name: str, where: str) -> str:
    if column_name not in row:
        found = ", ".join(row) or "none"
        raise InputError(f"{where}: has no column {column_name!r} but {found}; choose one with --column_name")
    if not isinstance(row[column_name], str):
        raise InputError(f"{where}: column {column_name!r} is {row[column_name]!r}, not text")
    return row[column_name]


def encode_prompts(
    prompts: list[str],
    tokenizer: "PreTrainedTokenizerBase",
    use_chat_template: bool,
    vocabulary_size: int,
    max_length: int,
) -> list[list[int]]:
    """Token ids of each prompt, with one BOS where the tokenizer adds one and never an EOS at the end."""
    if use_chat_template and tokenizer.chat_template is None:
        raise InputError("--use_chat_template: the tokenizer has no chat template; leave the flag out")
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        if use_chat_template:
            messages = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        else:
            has_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
            ids = tokenizer(prompt, add_special_tokens=not has_bos).input_ids
            if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
                ids = ids[:-1]
        if not ids:
            raise InputError(f"prompt {number}: {prompt!r} has no tokens; write something")
        if len(ids) > max_length:
            raise InputError(
                f"prompt {number}: {len(ids)} tokens, but with --max_new_tokens the model's context leaves room for "
                f"{max_length}; shorten the prompt or lower --max_new_tokens"
            )
        if max(ids) >= vocabulary_size:
            raise InputError(
                f"prompt {number}: token {max(ids)} is beyond the model's vocabulary of {vocabulary_size}; the "
                "tokenizer belongs to another model"
            )
        encoded.append(ids)
    return encoded


def find_stop_tokens(tokens: list[str], tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Ids of the end tokens that the user names."""
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise InputError(f"--stop_tokens: {token!r} is not one token of this tokenizer")
    return {vocabulary[token] for token in tokens}


# ---------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """Prompts that are generated together: their places in the user's order, and their common width in tokens."""

    places: list[int]
    width: int


def plan_batches(lengths: list[int], batch_size: int, bucket_size: int, max_width: int) -> list[Batch]:
    """Batches of like lengths on few widths, since every new shape is a graph that a Gaudi has to compile.

    There are as many widths as powers of two would be, but where they pad least. With a `bucket_size` optimum-habana
    pads `width + 1` to a multiple of it.
    """
    order = range(len(lengths)) if batch_size == 1 else sorted(range(len(lengths)), key=lengths.__getitem__)
    groups = [list(order[start : start + batch_size]) for start in range(0, len(lengths), batch_size)]
    longest = [max(lengths[place] for place in group) for group in groups]
    if bucket_size > 0:
        widths = [-(-(length + 1) // bucket_size) * bucket_size - 1 for length in longest]
    else:
        from align.data.packing import choose_buckets

        number = len({max(MIN_WIDTH, 1 << (length - 1).bit_length()) for length in longest})
        buckets = choose_buckets(longest, number, max_width, multiple_of=-(-max(longest) // WIDTH_CHOICES))
        widths = [buckets[bisect_left(buckets, length)] for length in longest]
    return [
        Batch(group, max(length, min(width, max_width)))
        for group, length, width in zip(groups, longest, widths, strict=True)
    ]


def pad_batch(
    encoded: list[list[int]], width: int, rows: int, pad: int
) -> tuple["torch.LongTensor", "torch.LongTensor"]:
    """Ids and attention mask `[rows, width]`, padded on the left; missing rows repeat the first one."""
    import torch

    ids, mask = np.full((rows, width), pad), np.zeros((rows, width), dtype=np.int64)
    for row in range(rows):
        prompt = encoded[row] if row < len(encoded) else encoded[0]
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


# ---------------------------------------------------------------- model


def find_folders(
    model_name_or_path: str | None, tokenizer_name_or_path: str | None, peft_model: str | None
) -> tuple[Path, Path, Path | None]:
    """Folders of model, tokenizer and adapter, from the hub where they are not local; the model's files are whole.

    Where no model is named it is the one that the adapter was trained on; where no tokenizer is named it is the
    adapter's, which may have learnt new tokens, else the model's.
    """
    patterns = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.safetensors")
    adapter = peft_model and find_folder(peft_model, "--peft_model", *patterns, "adapter_model.bin")
    if adapter:
        recorded = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
        model_name_or_path = model_name_or_path or recorded
    if not model_name_or_path:
        raise InputError(f"--model_name_or_path: missing, and --peft_model {peft_model} names no base; give one")
    folder = find_folder(model_name_or_path, "--model_name_or_path", *patterns)
    if not any(folder.glob("*.safetensors")):
        folder = find_folder(model_name_or_path, "--model_name_or_path", *patterns, "*.bin")
    with contextlib.suppress(NotStreamableError):  # which torch can load all the same
        open_checkpoint(folder)
    if tokenizer_name_or_path:
        tokenizer = find_folder(tokenizer_name_or_path, "--tokenizer_name_or_path", *patterns[:-1])
    else:
        tokenizer = adapter if adapter and (adapter / "tokenizer_config.json").exists() else folder
    return folder, tokenizer, adapter or None


def load_config_and_tokenizer(
    folder: Path, tokenizer_folder: Path, trust_remote_code: bool
) -> tuple["PretrainedConfig", "PreTrainedTokenizerBase"]:
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"--model_name_or_path: no model in {folder}: {_one_line(error)}") from error
    try:
        return config, AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"--tokenizer_name_or_path: no tokenizer in {tokenizer_folder}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def load_model(
    folder: Path,
    adapter: Path | None,
    vocabulary_size: int,
    bf16: bool,
    trust_remote_code: bool,
    world_size: int,
    use_hpu_graphs: bool,
) -> "PreTrainedModel":
    """The model on its card, or each rank's part of it; an adapter is folded in in memory, nothing is written.

    Ranks map the same safetensors file, so that a host holds one copy of the model while they cut out their parts.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from habana_frameworks.torch.hpu import wrap_in_hpu_graph

    dtype = torch.bfloat16 if bf16 else torch.float32
    try:  # eager still runs the fused kernel; Mixtral's sdpa is not causal without padding
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            torch_dtype=dtype,
            attn_implementation="eager",
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"--model_name_or_path: {folder} cannot be loaded: {_one_line(error)}") from error
    if loaded["missing_keys"]:
        raise InputError(f"--model_name_or_path: {folder} holds no weights for {sorted(loaded['missing_keys'])[0]}")
    if adapter is not None:
        if vocabulary_size > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(vocabulary_size)
        model = _fold_adapter(model, adapter)
    model = model.eval()
    model = _split(model, dtype, world_size) if world_size > 1 else model.to(torch.device("hpu"))
    return wrap_in_hpu_graph(model) if use_hpu_graphs else model


def _fold_adapter(model: "PreTrainedModel", adapter: Path) -> "PreTrainedModel":
    from peft import PeftConfig, get_peft_model
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    from align.merge.writing import merge_as_trained

    dtype = model.dtype
    try:
        adapted = get_peft_model(model, PeftConfig.from_pretrained(adapter), autocast_adapter_dtype=False)
        loaded = set_peft_model_state_dict(adapted, load_peft_weights(adapter, device="cpu"))
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"--peft_model: {adapter} does not fit the model: {_one_line(error)}") from error
    if loaded.unexpected_keys:
        raise InputError(f"--peft_model: {adapter} does not fit the model: it has no {loaded.unexpected_keys[0]}")
    return merge_as_trained(adapted).to(dtype)


def _split(model: "PreTrainedModel", dtype: "torch.dtype", world_size: int) -> "PreTrainedModel":
    """This rank's part of the model under DeepSpeed's tensor parallelism."""
    import deepspeed
    from optimum.habana.checkpoint_utils import get_ds_injection_policy

    whole = model.num_parameters()
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


# ---------------------------------------------------------------- generation


@dataclass(frozen=True)
class Timing:
    """Of one batch: seconds to its first tokens (None with beams) and its end, tokens of prompts and answers, steps."""

    first_token: float | None
    total: float
    prompt_tokens: int
    new_tokens: int
    steps: int


class EndWatch:
    """Stopping criterion: ends a batch once every row has said an end token, and notes when the first token came.

    optimum-habana 1.21.2's own criterion blanks the rows that have no end token when another row has one
    (generation/utils.py:2993), so end tokens are left to this one. It looks every `steps_per_check` tokens.
    """

    def __init__(self, end_tokens: list[int], width: int, steps_per_check: int):
        self.end_tokens = end_tokens
        self.width = width
        self.steps_per_check = steps_per_check
        self.first_token_at: float | None = None

    def __call__(self, input_ids: "torch.LongTensor", scores: Any, token_idx: int | None = None, **_: Any) -> bool:
        length = token_idx or input_ids.shape[1]
        step = length - self.width
        if self.first_token_at is not None and (not self.end_tokens or step % self.steps_per_check):
            return False
        texts = input_ids.tolist()  # what torch would do from here on were graphs
        self.first_token_at = self.first_token_at or time.perf_counter()
        return all(any(token in self.end_tokens for token in ids[self.width : length]) for ids in texts)


class RepetitionPenalty:
    """Logits processor: the penalty of CTRL (arXiv 1909.05858), for text alone.

    transformers' own takes padding for text, of which static shapes have a lot: where the pad token is EOS, no text
    would end.
    """

    def __init__(self, penalty: float, pad: int):
        self.penalty = penalty
        self.pad = pad

    def __call__(self, input_ids: "torch.LongTensor", scores: "torch.FloatTensor") -> "torch.FloatTensor":
        said = scores.gather(1, input_ids)
        said = (said / self.penalty).where(said > 0, said * self.penalty)
        penalised = scores.scatter(1, input_ids, said)
        penalised[:, self.pad] = scores[:, self.pad]
        return penalised


class TerminalStreamer:
    """Shows one text as it appears, by whole characters."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompt_ids: list[int], end_tokens: list[int]):
        self.tokenizer = tokenizer
        self.prompt_ids = prompt_ids
        self.end_tokens = end_tokens
        self.new_ids: list[int] | None = None
        self.shown = ""

    def put(self, ids: "torch.LongTensor") -> None:
        if self.new_ids is None:  # the first call brings the prompt
            self.new_ids = []
            return
        self.new_ids += [token for token in ids.tolist() if token not in self.end_tokens]
        text = decode_new(self.tokenizer, self.prompt_ids, self.new_ids)
        if not text.endswith("\ufffd"):
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text

    def end(self) -> None:
        print(decode_new(self.tokenizer, self.prompt_ids, self.new_ids)[len(self.shown) :])


def decode_new(tokenizer: "PreTrainedTokenizerBase", prompt_ids: list[int], new_ids: list[int]) -> str:
    """The text that `new_ids` add to the prompt; decoded alone, many tokenizers would lose a leading blank."""
    prompt, whole = tokenizer.batch_decode(
        [prompt_ids, prompt_ids + new_ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return whole[len(prompt) :]


@dataclass(frozen=True)
class TextGenerator:
    """A model on its card, with its tokenizer and how to decode; a batch has `rows` prompts."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    config: "GaudiGenerationConfig"
    end_tokens: list[int]
    repetition_penalty: float
    use_hpu_graphs: bool
    rows: int

    def generate(
        self, encoded: list[list[int]], width: int, streamer: TerminalStreamer | None = None
    ) -> tuple[list[list[int]], Timing]:
        """New tokens of each prompt up to its first end token, which is included, and how long they took."""
        start = time.perf_counter()
        ids, mask = pad_batch(encoded, width, self.rows, self.config.pad_token_id)
        watch = EndWatch(self.end_tokens, width, 1 if self.rows == 1 else STEPS_PER_CHECK)  # the same on every rank
        beams = self.config.num_beams > 1
        penalty = RepetitionPenalty(self.repetition_penalty, self.config.pad_token_id)
        output = self.model.generate(
            input_ids=ids.to("hpu"),
            attention_mask=mask.to("hpu"),
            generation_config=self.config,
            use_model_defaults=False,
            stopping_criteria=[] if beams else [watch],
            logits_processor=[penalty] if self.repetition_penalty != 1 else [],
            streamer=streamer,
            lazy_mode=True,
            hpu_graphs=self.use_hpu_graphs,
        )
        texts = output.tolist()[: len(encoded)]
        end = time.perf_counter()
        new = [cut_after_end(ids[width : width + self.config.max_new_tokens], self.end_tokens) for ids in texts]
        lengths = list(map(len, new))
        first_token = None if beams else (watch.first_token_at or end) - start
        return new, Timing(first_token, end - start, sum(map(len, encoded)), sum(lengths), max(lengths))


def cut_after_end(tokens: list[int], end_tokens: list[int]) -> list[int]:
    """The tokens up to the first end token, which is included."""
    return next((tokens[: place + 1] for place, token in enumerate(tokens) if token in end_tokens), tokens)
