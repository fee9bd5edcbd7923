"""What sft.py, dpo.py and run_generation.py make of each row of family_models.py, beside plain transformers.

python tests/measure_families.py docs/models.md     writes the table that users read (`make models`; about 3 minutes)
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from family_models import CONFIGS
from plain_families import LENGTHS, NEW_TOKENS, PROMPTS, draw, draw_pair
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import merge_peft_adapter
from align.errors import InputError
from align.generation.config import (
    DecodingArguments,
    GaudiArguments,
    choose_kernels,
    fit_to_class,
    make_forward_options,
    make_generation_config,
)
from align.generation.decoding import TextGenerator
from align.generation.model import ModelArguments as GenerationArguments
from align.generation.model import load_model as load_for_generation
from align.generation.prompts import plan_batches
from align.merge.checkpoints import NotStreamableError, open_checkpoint, read_json
from align.merge.plan import open_adapter, plan_merge
from align.models.attention import find_samples, probe_rows, segment_mask
from align.models.families import IGNORE_PADDING, UNUSABLE, find_fault, is_exact_in_fused_kernel
from align.models.guard import check_adapter, load_config
from align.models.loading import ModelArguments, load_model
from align.training.pairs import Bucket, Layout, PairCollator
from align.training.preference import leave_out_dropout
from align.upstream_fixes import adapt_transformers, attention_inputs, gaudi_class

ROOT = Path(__file__).parent.parent
HPU = torch.device("hpu")
LONGEST = 64  # tokens, longer than any window of family_models.py
RIGHT = 1e-4  # how far log-probs may be off
TRAINING = SimpleNamespace(
    bf16=False,
    deepspeed=None,
    attn_implementation="eager",
    use_zero3_leaf_promotion=False,
    flash_attention_recompute=False,
    flash_attention_causal_mask=False,
    flash_attention_fast_softmax=False,
)  # those that load_model reads
TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=None)


def make_plain(folder: Path, *rows: str) -> Path:
    """Models and what plain transformers make of them, in a process that optimum-habana has not patched."""
    script = Path(__file__).with_name("plain_families.py")
    subprocess.run([sys.executable, script, folder, *rows], check=True, capture_output=True)
    return folder


def packed_row() -> dict[str, torch.Tensor]:
    ids, positions, segments = [], [], []
    for number, length in enumerate(LENGTHS):
        ids += draw(length)
        positions += range(length)
        segments += [number + 1] * length
    row = {"input_ids": ids, "position_ids": positions, "segment_ids": segments}
    return {name: torch.tensor(values + [0] * 4) for name, values in row.items()}


def pair_rows(shared: bool) -> list[dict[str, torch.Tensor]]:
    """As dpo.py's collator makes them: one row with both answers, or two padded ones."""
    prompt, *answers = map(torch.tensor, draw_pair())
    pair = {"index": 0, "prompt": prompt.numpy(), "answers": [answer.numpy() for answer in answers]}
    pair["labels"] = pair["answers"]
    batch = PairCollator(Layout(shared, 1, (Bucket(32, 24),), {}), 0)([pair])
    names = ("input_ids", "position_ids", "segment_ids", "branch_ids") if shared else ("input_ids", "attention_mask")
    return [{name: batch[name][row] for name in names} for row in range(1 if shared else 2)]


def compare(model, row: dict[str, torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference of a log-prob, by samples."""
    inputs = {name: ids[None].to(HPU) for name, ids in row.items()}
    if "segment_ids" in inputs:
        mask = segment_mask(model, inputs.pop("segment_ids"), inputs["position_ids"], inputs.pop("branch_ids", None))
        inputs["attention_mask"] = mask
    logits = model(**inputs, **attention_inputs(model), use_cache=False).logits[0].log_softmax(-1).cpu()
    logits.sum().backward()
    samples = zip(find_samples(row), expected, strict=True)
    return max((logits[columns] - right[: len(columns)]).abs().max().item() for columns, right in samples)


def measure_training(folder: Path, expected: list[torch.Tensor], flash: bool | None = None) -> dict:
    """How a row holds its samples, and the largest difference of a log-prob: padded where the probe wants it.

    `flash` is --use_flash_attention. Values are a pair of those two, by `packed` and `shared`.
    """
    config = load_config(folder, "--model_name_or_path")
    args = ModelArguments(model_name_or_path=str(folder), use_flash_attention=flash)
    model = load_model(args, TRAINING, config, frozen=False, longest=LONGEST).train()
    leave_out_dropout(model)
    options = attention_inputs(model)
    rows = {"packed": (packed_row(), expected[:3]), "shared": (pair_rows(True)[0], expected[3:])}
    result = {}
    for name, (row, right) in rows.items():
        if probe_rows(model, row, HPU, **options):
            result[name] = (name, compare(model, row, right))
        else:
            padded = zip(pair_rows(False), expected[3:], strict=True)
            result[name] = ("padded", max(compare(model, row, [right]) for row, right in padded))
    return result


WAYS = {  # what a flag leaves as it is; "alone" and "batch" are without any
    "alone": {},
    "batch": {},
    "no cache": {"use_kv_cache": False},
    "flash attention": {"use_flash_attention": True},
    "buckets": {"bucket_size": 16},
    "reuse_cache": {"reuse_cache": True},
}


def measure_generation(folder: Path, answers: list[list[int]], beams: list[list[int]]) -> dict[str, str]:
    """`right`, `other text`, `no effect`, or why it is refused; by way to generate."""
    model = load_for_texts(folder)
    prompts = [draw(length, 1) for length in PROMPTS]
    result = {}
    plain = make_forward_options(fit_to_class(model, GaudiArguments()), {})
    for name, flags in WAYS.items():
        kept = fit_to_class(model, GaudiArguments(**flags))
        if flags and name != "no cache" and make_forward_options(kept, choose_kernels(model, kept)) == plain:
            result[name] = "no effect"
        elif name == "alone":
            result[name] = judge(lambda: [generate(model, [prompt])[0] for prompt in prompts], answers)
        else:
            result[name] = judge(lambda flags=flags: generate(model, prompts, **flags), answers)
    if result["reuse_cache"] == "right":  # also of a prompt that is alone and has a single token
        result["reuse_cache"] = judge(lambda: generate(model, prompts[-1:], reuse_cache=True), answers[-1:])
    return result | {"beams": judge(lambda: generate(model, prompts, num_beams=2), beams)}


def load_for_texts(folder: Path, **options) -> torch.nn.Module:
    config = load_config(folder, "--model_name_or_path")
    options = {"arguments": GenerationArguments(bf16=False), "world_size": 1, "adapter": None} | options
    size = config.vocab_size
    return load_for_generation(folder, vocabulary_size=size, use_hpu_graphs=False, longest=LONGEST, **options)


def generate(model, prompts: list[list[int]], num_beams: int = 1, **flags) -> list[list[int]]:
    gaudi = fit_to_class(model, GaudiArguments(**flags))
    decoding = DecodingArguments(max_new_tokens=NEW_TOKENS, num_beams=num_beams)
    config = make_generation_config(model, TOKENIZER, decoding, [])
    options = make_forward_options(gaudi, choose_kernels(model, gaudi))
    generator = TextGenerator(model, TOKENIZER, config, options, [], len(prompts))
    lengths, ignores_padding = list(map(len, prompts)), model.config.model_type in IGNORE_PADDING
    answers = {}
    for batch in plan_batches(lengths, len(prompts), -1, LONGEST, ignores_padding=ignores_padding):
        said, _ = generator.generate([prompts[place] for place in batch.places], batch.width)
        answers |= zip(batch.places, said, strict=True)
    return [answers[place] for place in range(len(prompts))]


def measure_merge(folder: Path) -> str:
    """How merge_peft_adapter.py merges the adapter beside the model, and whether all tensors are PEFT's to the bit."""
    right = load_file(folder / "merged.safetensors")
    adapter, config = folder / "adapter", check_adapter(folder / "adapter", "--adapter_model_name")
    try:
        plan_merge(open_checkpoint(folder), read_json(folder / "config.json"), open_adapter(adapter, config), None)
        way = "streamed"
    except NotStreamableError:
        way = "through PEFT"
    with tempfile.TemporaryDirectory() as out:
        names = ["--base_model_name", str(folder), "--adapter_model_name", str(adapter), "--output_name", f"{out}/plan"]
        merge_peft_adapter.main(names)
        merged = [read_all(each) for each in (Path(out, "plan"), folder / "whole")]
    return f"{way}, same bits" if all(holds(each, right) for each in merged) else "other weights"


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def holds(merged: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors are there, one of those that are tied for all of them."""
    tied = [tensor for name, tensor in right.items() if name not in merged]
    return set(merged) <= set(right) and all(
        [
            *(torch.equal(tensor, right[name]) for name, tensor in merged.items()),
            *(any(torch.equal(tensor, other) for other in merged.values()) for tensor in tied),
        ]
    )


def judge(attempt, right: list[list[int]]) -> str:
    try:
        said = attempt()
    except InputError:
        return "refused"
    except Exception as error:  # the table says that it stops
        return f"stops ({type(error).__name__}: {error})"[:150]
    return "right" if said == right else "other text"


def measure(folder: Path) -> dict:
    adapt_transformers()
    plain = json.loads((folder / "plain.json").read_text())
    config = load_config(folder, "--model_name_or_path")
    result = {"fault": find_fault(config, LONGEST), "has class": gaudi_class(config) is not None}
    logits = list(map(torch.tensor, plain["logits"]))
    result |= measure_training(folder, logits)
    if is_exact_in_fused_kernel(config, LONGEST):
        result["without the kernel"] = measure_training(folder, logits, flash=False)
    result |= measure_generation(folder, plain["answers"], plain["beams"])
    return result | {"merge": measure_merge(folder)}


def measure_ranks(folder: Path, *rows: str) -> dict[str, str]:
    """What became of each row's texts with the model split over two cards."""
    command = [sys.executable, ROOT / "gaudi_spawn.py", "--world_size", "2", "--use_deepspeed"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command += [Path(__file__).with_name("family_ranks.py"), folder, *rows]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": path})
    return json.loads((folder / "ranks.json").read_text())


def describe(row: str, result: dict) -> str:
    """A line of docs/models.md; the last cell is of two cards."""
    own = f"transformers', as optimum-habana's {result['fault']}" if result["fault"] else "optimum-habana's"
    cells = [row, own if result["has class"] else "transformers', the only one"]
    cells += [f"{how}, {difference:.0e}" for how, difference in (result["packed"], result["shared"])]
    cells.append(" or ".join(sorted({result[name] for name in ("alone", "batch", "no cache")})))
    cells += [result[name] for name in ("beams", "reuse_cache", "buckets", "flash attention", "merge", "two cards")]
    return f"| {' | '.join(cells)} |"


def describe_unusable() -> str:
    """Behind the table: the kinds that are refused."""
    refused = (f"- {kind}: {reason}" for kind, reason in UNUSABLE.items())
    return "Refused in one line, as nothing here computes them rightly:\n\n" + "\n".join(refused)


HEAD = """\
# Which models work

`make models` writes this page: each row is a tiny random model of that family, taken through what `sft.py`, `dpo.py`
and `run_generation.py` do with it, in float32 on the emulator, beside plain transformers. Where optimum-habana's own
class of a family is wrong or stops, transformers' class runs instead: right, but without optimum-habana's kernels and
static shapes, so slower on a card. The scripts say so in one line when they load such a model. A family that is not
in the table runs too, and is probed as all are.

- **packing** and **pairs**: several samples in one row (`sft.py`), both answers of a pair behind one prompt
  (`dpo.py`), or a padded row for each, and how far a log-prob is off at most. The scripts try the longest row of the
  data on the loaded model before the first step, and pad by themselves where its samples do not say what they say
  alone; `--skip_probe True` leaves that out.
  Falcon, Llama, Mistral, Mixtral, Qwen2 and Qwen3 with or without experts attend in Gaudi's fused kernel where
  optimum-habana's class runs (`--use_flash_attention False` for its own default): the samples of a row go to it as the
  mask that optimum-habana gives it for a padded batch.
- **text**: greedy answers to prompts of 19, 7 and 1 tokens, one at a time, in a padded batch, and without a cache.
  The flags behind it are run_generation.py's; `refused` is one line before the first token, `no effect` a line that
  the flag changes nothing. Before the first answer the script tries prompts of yours on the loaded model, with padding
  and two tokens from the cache, beside a plain pass without either: where they differ, transformers' class runs
  instead, and if that is wrong too, the run ends with exit code 3 (`--skip_probe` leaves that out).
- **(window)**: windows in the table are 8 tokens, shorter than the text. Where no text is longer than a model's
  window, such as the 4,096 tokens of Mistral and Gemma 2, optimum-habana's class keeps running.
- **merge**: of an adapter on all linear modules and the embedding. Every tensor has the bits of PEFT's
  `merge_and_unload`, shard by shard and also through PEFT, as `merge_peft_adapter.py` merges what it cannot stream.
  The embedding of Gemma 3, XGLM and BioGPT scales what it looks up, which PEFT 0.17 leaves out until the merge: it is
  no target of `--lora_target_modules`, and a merge warns of such an adapter.
- **two cards**: the same texts with the model split by DeepSpeed. `not split` is right too, but each card holds the
  whole model, which is said; `refused` where the cards cannot share the key/value heads evenly. Bloom is split in
  optimum-habana's class.

Models whose layers carry a state from token to token (Mamba, Falcon-H1, Granite 4, Jamba, LFM2 …) get rows of their
own. LFM2, MiniMax and Mamba generate without a cache, which is said; LFM2 ignores padding, so that a batch has prompts
of one length.

"""
COLUMNS = ("model", "class", "packing", "pairs", "text", "`--num_beams`", "`--reuse_cache`", "`--bucket_size`")
COLUMNS += ("`--use_flash_attention`", "merge", "two cards")
HEAD += f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"


def write_page(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_plain(Path(folder))
        cards = measure_ranks(Path(folder), *CONFIGS)
        results = [
            measure(Path(folder) / str(number)) | {"two cards": cards[row]} for number, row in enumerate(CONFIGS)
        ]
        lines = [describe(row, result) for row, result in zip(CONFIGS, results, strict=True)]
    path.write_text(HEAD + "\n".join(lines) + "\n\n" + describe_unusable() + "\n")


if __name__ == "__main__":
    write_page(Path(sys.argv[1]))
