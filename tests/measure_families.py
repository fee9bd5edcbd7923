"""What sft.py, dpo.py and run_generation.py make of each row of family_models.py, beside plain transformers.

python tests/measure_families.py docs/models.md     writes the table that users read (`make models`; about 3 minutes)
"""

import inspect
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from family_models import CONFIGS
from plain_families import LENGTHS, NEW_TOKENS, PROMPTS, draw, draw_pair
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
from align.errors import InputError
from align.generation.config import (
    DecodingArguments,
    GaudiArguments,
    check_support,
    choose_kernels,
    make_forward_options,
    make_generation_config,
)
from align.generation.decoding import TextGenerator
from align.generation.model import ModelArguments as GenerationArguments
from align.generation.model import load_model as load_for_generation
from align.models.attention import find_samples, probe_rows, segment_mask
from align.models.families import find_fault, is_exact_in_fused_kernel
from align.models.loading import ModelArguments, load_model
from align.training.pairs import Layout, PairCollator, Shape
from align.upstream_fixes import adapt_transformers, attention_inputs, gaudi_class

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
    batch = PairCollator(Layout(shared, 1, (Shape(32, 24),), {}), 0)([pair])
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
    config = AutoConfig.from_pretrained(folder)
    args = ModelArguments(model_name_or_path=str(folder), use_flash_attention=flash)
    model = load_model(args, TRAINING, config, frozen=False, longest=LONGEST).train()  # there is no dropout
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


def measure_generation(folder: Path, answers: list[list[int]], beams: list[list[int]]) -> dict[str, str]:
    """`right`, `other text`, or why it is refused; by way to generate."""
    config = AutoConfig.from_pretrained(folder)
    prompts = [draw(length, 1) for length in PROMPTS]
    load = {"vocabulary_size": config.vocab_size, "arguments": GenerationArguments(), "world_size": 1, "adapter": None}
    load |= {"use_hpu_graphs": False, "longest": LONGEST}
    model = load_for_generation(folder, **load)
    decoding = DecodingArguments(max_new_tokens=NEW_TOKENS)

    def generate(encoded: list[list[int]], decoding=decoding, **flags) -> list[list[int]]:
        gaudi = GaudiArguments(**flags)
        check_support(model, gaudi)
        config = make_generation_config(model, TOKENIZER, decoding, [])
        options = make_forward_options(gaudi, choose_kernels(model, gaudi))
        generator = TextGenerator(model, TOKENIZER, config, options, [], len(encoded))
        return generator.generate(encoded, max(map(len, encoded)))[0]

    def judge(attempt) -> str:
        try:
            said, right = attempt()
        except InputError:
            return "refused"
        except Exception as error:  # the table says that it stops
            return f"stops ({type(error).__name__}: {error})"[:150]
        return "right" if said == right else "other text"

    ways = {
        "alone": lambda: ([generate([prompt])[0] for prompt in prompts], answers),
        "batch": lambda: (generate(prompts), answers),
        "no cache": lambda: (generate(prompts, use_kv_cache=False), answers),
        "flash attention": lambda: (generate(prompts, use_flash_attention=True), answers),
        "buckets": lambda: (generate(prompts, bucket_size=16), answers),
        "reuse_cache": lambda: (
            [*generate(prompts, reuse_cache=True), *generate(prompts[-1:], reuse_cache=True)],
            [*answers, answers[-1]],
        ),
    }
    result = {name: judge(attempt) for name, attempt in ways.items()}
    if "use_flash_attention" not in inspect.signature(type(model).forward).parameters:
        result["flash attention"] = "no kernel"

    search = replace(decoding, num_beams=2)
    return result | {"beams": judge(lambda: (generate(prompts, search), beams))}


def measure(folder: Path) -> dict:
    adapt_transformers()
    plain = json.loads((folder / "plain.json").read_text())
    config = AutoConfig.from_pretrained(folder)
    result = {"fault": find_fault(config, LONGEST), "has class": gaudi_class(config) is not None}
    logits = list(map(torch.tensor, plain["logits"]))
    result |= measure_training(folder, logits)
    if is_exact_in_fused_kernel(config, LONGEST):
        result["without the kernel"] = measure_training(folder, logits, flash=False)
    return result | measure_generation(folder, plain["answers"], plain["beams"])


def describe(row: str, result: dict) -> str:
    """A line of docs/models.md."""
    own = f"transformers', as optimum-habana's {result['fault']}" if result["fault"] else "optimum-habana's"
    cells = [row, own if result["has class"] else "transformers', the only one"]
    cells += [f"{how}, {difference:.0e}" for how, difference in (result["packed"], result["shared"])]
    cells.append(" or ".join(sorted({result[name] for name in ("alone", "batch", "no cache")})))
    cells += [result[name] for name in ("beams", "reuse_cache", "buckets", "flash attention")]
    return f"| {' | '.join(cells)} |"


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
  The flags behind it are run_generation.py's; `refused` is one line before the first token, `no kernel` a line that
  the flag changes nothing. Before the first answer the script tries prompts of yours on the loaded model, with padding
  and two tokens from the cache, beside a plain pass without either: where they differ, transformers' class runs
  instead, and if that is wrong too, the run ends with exit code 3 (`--skip_probe` leaves that out).
- **(window)**: windows in the table are 8 tokens, shorter than the text. Where no text is longer than a model's
  window, such as the 4,096 tokens of Mistral and Gemma 2, optimum-habana's class keeps running.

| model | class | packing | pairs | text | `--num_beams` | `--reuse_cache` | `--bucket_size` | `--use_flash_attention` |
|---|---|---|---|---|---|---|---|---|
"""


def write_page(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        make_plain(Path(folder))
        lines = [describe(row, measure(Path(folder) / str(number))) for number, row in enumerate(CONFIGS)]
    path.write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    write_page(Path(sys.argv[1]))
