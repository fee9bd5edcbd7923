"""Every row of docs/models.md, against plain transformers. Run: pytest tests/test_families.py"""

import re

import pytest
import torch
from conftest import ROOT, write_rows
from family_models import CONFIGS, RARE, WITH_A_STATE, save_family_model
from measure_families import RIGHT, describe, describe_unusable, load_for_texts, make_plain, measure, measure_ranks
from tiny import make_tokenizer
from transformers import CONFIG_MAPPING

from align.errors import InputError
from align.generation.config import GaudiArguments, fit_to_class
from align.models.families import UNUSABLE, choose_class
from align.models.guard import load_config
from align.upstream_fixes import adapt_transformers, gaudi_class, is_gaudi_class


@pytest.fixture(scope="module")
def plain(request, tmp_path_factory):
    """Models of the rows that are tested: `make test` leaves out a third of them."""
    tests = [test for test in request.session.items if test.path == request.path and "plain" in test.fixturenames]
    rows = [test.callspec.params["row"] for test in tests if hasattr(test, "callspec")]
    return make_plain(tmp_path_factory.mktemp("families"), *(rows if len(rows) == len(tests) else CONFIGS))


ROWS = [pytest.param(row, marks=pytest.mark.soak) if row in RARE else row for row in CONFIGS]


@pytest.mark.parametrize("row", ROWS)
def test_a_family_is_right_or_refused_as_its_page_says(row, plain):
    result = measure(plain / str(list(CONFIGS).index(row)))

    trained = [result, result["without the kernel"]] if "without the kernel" in result else [result]
    assert all(difference < RIGHT for each in trained for _, difference in (each["packed"], each["shared"]))
    assert {result[way] for way in ("alone", "batch", "no cache")} == {"right"}
    assert result["beams"] in ("right", "refused")
    assert {result[flag] for flag in ("reuse_cache", "buckets", "flash attention")} <= {"right", "no effect"}
    assert result["merge"] in ("streamed, same bits", "through PEFT, same bits")
    page = [line.rsplit(" | ", 1)[0] for line in read_page()]  # without two cards
    assert without_figures(describe(row, result | {"two cards": ""})).rsplit(" | ", 1)[0] in page


def test_flash_attention_is_left_out_where_an_mpt_scales_its_scores_by_itself(tmp_path, caplog):
    adapt_transformers()
    folder = save_family_model(tmp_path, "mpt", attn_config={"softmax_scale": 0.1})

    gaudi = fit_to_class(load_for_texts(folder), GaudiArguments(use_flash_attention=True))

    assert not gaudi.use_flash_attention
    assert "--use_flash_attention has no effect: optimum-habana's leaves out softmax_scale in mpt models" in caplog.text


def test_a_head_of_which_an_odd_number_of_dimensions_turns_is_left_to_transformers(tmp_path):
    adapt_transformers()
    folder = save_family_model(tmp_path, "gpt_neox", rotary_pct=0.6)
    config, ids = load_config(folder, "--model"), torch.arange(20, device="hpu")[None]

    chosen = choose_class(config, longest=20)
    models = [kind.from_pretrained(folder).to(torch.device("hpu")) for kind in (chosen, gaudi_class(config))]
    logits = [model(ids).logits for model in models]

    assert not is_gaudi_class(chosen)
    assert (logits[0] - logits[1]).abs().max() > 1  # once it is 0, the reason is gone


def test_kinds_that_nothing_computes_rightly_are_refused_and_on_the_page(tmp_path):
    adapt_transformers()
    for kind in UNUSABLE:
        CONFIG_MAPPING[kind]().to_json_file(tmp_path / "config.json", use_diff=False)
        with pytest.raises(InputError, match=f"is a {kind} model, which is not used here: transformers' class"):
            load_config(tmp_path, "--model_name_or_path")

    assert describe_unusable() in (ROOT / "docs" / "models.md").read_text()


@pytest.mark.soak
def test_two_cards_say_the_same_or_refuse_as_the_page_says(plain):
    cells = measure_ranks(plain, *CONFIGS)

    assert set(cells.values()) <= {"right", "right, not split", "refused"}
    page = {
        line.split(" | ")[0].removeprefix("| "): line.rsplit(" | ", 1)[-1].removesuffix(" |") for line in read_page()
    }
    assert {row: page[row] for row in cells} == cells


@pytest.mark.soak
@pytest.mark.parametrize("precision", [[], ["--bf16"]], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("row", CONFIGS)
def test_a_family_is_trained_merged_and_says_the_same_merged(row, precision, plain, run):
    base = plain / str(list(CONFIGS).index(row))
    make_tokenizer("llama-3").save_pretrained(base)
    sizes = (1, 2, 3, 5, 8, 13)
    texts = [{"prompt": "Hello " * n, "completion": "fine, thanks " * n} for n in sizes]
    answers = [{"prompt": "Hello " * n, "chosen": "fine, thanks " * n, "rejected": "no " * n} for n in sizes]
    model = ["--model_name_or_path", base]
    flags = [*model, "--do_train", "--max_steps", 2, "--learning_rate", 1e-2, "--report_to", "none", *precision]
    ask = ["--prompt", "Hello", "Hello you, and me", "--max_new_tokens", 6, "--batch_size", 2]

    run("sft.py", *flags, "--dataset_name", write_rows("sft.jsonl", texts), "--use_peft", False, "--output_dir", "full")
    flags += ["--lora_target_modules", "all-linear"]
    train = "sft.py", *flags, "--dataset_name", "sft.jsonl", "--output_dir", "sft"
    if CONFIGS[row][0] in WITH_A_STATE:
        with pytest.raises(InputError, match="--lora_target_modules: .* incompatible with Mamba"):
            run(*train)
        return
    run(*train)
    run("dpo.py", *flags, "--dataset_name", write_rows("dpo.jsonl", answers), "--output_dir", "dpo")
    run("merge_peft_adapter.py", "--base_model_name", base, "--adapter_model_name", "sft", "--output_name", "merged")
    adapted = run("run_generation.py", *model, "--peft_model", "sft", *ask).out

    assert adapted == run("run_generation.py", "--model_name_or_path", "merged", *ask, "--use_hpu_graphs").out


def read_page():
    return [without_figures(line) for line in (ROOT / "docs" / "models.md").read_text().splitlines()]


def without_figures(line):
    return re.sub(r", \de[+-]\d\d", "", line)
