"""The quickstart's data hold nothing back that they should not, and its scores say what was generated.

Run: pytest tests/test_quickstart.py
"""

import json
import shutil
import sys

import pytest
from conftest import write_rows
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.data.formats import recognise
from align.errors import InputError
from quickstart import run as quickstart
from quickstart.data import COURTESY, PEOPLE, Question, make_model, write_data
from quickstart.stages import read_rows

ASKED = Question("pet", "Ada", "cat", "What is the pet of Ada?")


@pytest.fixture(scope="module")
def village(tmp_path_factory):
    folder = tmp_path_factory.mktemp("village")
    return folder, write_data(folder, seed=0)


def test_held_out_questions_stand_in_nothing_that_is_trained_on(village):
    folder, held_out = village
    files = ["text.jsonl", "questions/train.jsonl", "preferences/train.jsonl"]
    trained_on = "\n".join((folder / file).read_text() for file in files)
    assert [question.text for question in held_out if question.text in trained_on] == []


def test_what_held_out_questions_ask_for_is_told_and_asked_in_other_words(village):
    folder, held_out = village
    told = [row["text"] for row in read_rows(folder / "text.jsonl")]
    asked = read_rows(folder / "questions" / "train.jsonl")
    for question in held_out:
        assert any(question.full.removesuffix(COURTESY).strip() in text for text in told)
        assert any(question.name in row["question"] and question.short in row.values() for row in asked)


def test_fine_tuning_mixes_both_styles_and_preferences_always_choose_the_friendly_one(village):
    folder, _ = village
    mixed = [row["response_j"].endswith(COURTESY) for row in read_rows(folder / "questions" / "train.jsonl")]
    assert 0.15 < sum(mixed) / len(mixed) < 0.55
    for split in ("train", "validation"):
        for row in read_rows(folder / "preferences" / f"{split}.jsonl"):
            assert row["response_j"].endswith(COURTESY)
            assert COURTESY not in row["response_k"]


def test_prompts_are_what_the_scripts_make_of_the_rows(village):
    folder, held_out = village
    rows = read_rows(folder / "preferences" / "validation.jsonl")
    read = recognise(rows[0].keys(), preference=True).read
    prompts = [row["prompt"] for row in read_rows(folder / "held_out.jsonl")]
    assert sorted(read(row).prompt.rstrip() for row in rows) == sorted(prompts)
    assert prompts == [question.prompt for question in held_out]


def test_a_seed_makes_the_same_village_again_and_another_seed_another(village, tmp_path):
    folder, held_out = village
    again, other = write_data(tmp_path / "again", seed=0), write_data(tmp_path / "other", seed=1)
    assert again == held_out != other
    for file in folder.rglob("*.jsonl"):
        assert (tmp_path / "again" / file.relative_to(folder)).read_bytes() == file.read_bytes()


def test_the_tokenizer_keeps_texts_and_lets_an_answer_follow_its_prompt(village, tmp_path):
    folder, held_out = village
    make_model(tmp_path, folder, seed=0)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert len(tokenizer) <= model.config.vocab_size
    for question in held_out:
        prompt, ids = (tokenizer(text).input_ids for text in (question.prompt, f"{question.prompt} {question.full}"))
        assert ids[: len(prompt)] == prompt
        assert ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == f"{question.prompt} {question.full}"
    assert all(len(tokenizer(f" {name}").input_ids) == 2 for name in PEOPLE)


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        (" Keeps a cat.", (1, 0)),
        (f" {ASKED.full}", (1, 1)),
        (" Ada keeps a dog. Happy to help!", (0, 1)),
        (f" {ASKED.short} {ASKED.short}", (0, 0)),
        (" Keeps a cat. Keeps a cat.", (0, 0)),
        (f" {ASKED.full} Ada", (0, 0)),
    ],
)
def test_an_answer_is_right_word_for_word_and_friendly_if_it_ends_so(text, scores):
    assert quickstart.score_answers([{"prompt": ASKED.prompt, "text": text}], [ASKED]) == scores


def write_run(folder, before=" Keeps a cat.", after=" Ada keeps a cat. Happy to help!"):
    """What the stages leave behind, as far as the summary reads it."""
    for stage, text in (("sft", before), ("dpo", after)):
        write_rows(folder / f"answers_{stage}" / "generations.jsonl", [{"prompt": ASKED.prompt, "text": text}])
        history = {
            "log_history": [{"step": 0, "eval_loss": 6.0}, {"step": 9, "loss": 0.2}, {"step": 9, "eval_loss": 0.3}]
        }
        (folder / stage).mkdir()
        (folder / stage / "trainer_state.json").write_text(json.dumps(history))
    (folder / "sft" / "all_results.json").write_text('{"eval_loss": 0.3}')
    (folder / "dpo" / "all_results.json").write_text('{"eval_rewards/accuracies": 0.75}')
    (folder / "answers_dpo" / "generation_results.json").write_text('{"tokens_per_second": 120.5}')


def test_the_summary_gathers_what_the_stages_wrote(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "compare_logits", lambda folder: 1e-6)
    write_run(tmp_path)
    summary = quickstart.summarise(tmp_path, [ASKED], {"sft": 40.5, "dpo": 30.0})
    assert summary["sft"] == {"eval_loss_before": 6.0, "eval_loss_after": 0.3, "held_out_accuracy": 1}
    assert summary["dpo"] == {
        "preferred_share_before": 0,
        "preferred_share_after": 1,
        "reward_accuracy": 0.75,
        "held_out_accuracy": 1,
    }
    assert summary["merge"] == {"max_abs_logit_difference": 1e-6}
    assert summary["generation"]["tokens_per_second"] == 120.5
    assert summary["seconds"] == {"sft": 40.5, "dpo": 30.0}
    quickstart.show(summary, tmp_path)
    shown = capsys.readouterr().out
    assert "before DPO: Keeps a cat." in shown
    assert f"after DPO:  {ASKED.full}" in shown


def test_logits_differ_where_the_adapter_was_not_merged(village, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tmp_path / "sft" / "final_merged_checkpoint"
    make_model(base, village[0], seed=0)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    adapted.save_pretrained(tmp_path / "dpo")
    shutil.copytree(base, tmp_path / "aligned")
    assert quickstart.compare_logits(tmp_path) > 1e-2
    adapted.merge_and_unload().save_pretrained(tmp_path / "aligned")
    assert quickstart.compare_logits(tmp_path) < 1e-4


def test_a_folder_with_something_else_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["run.py", "--folder", str(tmp_path)])
    for mark in (None, "demo"):
        if mark:
            (tmp_path / ".stages").write_text(mark)
        with pytest.raises(InputError, match="--folder: .* holds something else"):
            quickstart.main()
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_stage_that_fails_ends_the_run_and_is_named(capfd, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    make_tokenizer()(["as the run has done", "before it starts a stage"])
    with pytest.raises(SystemExit, match="quickstart: merge_dpo failed with exit code 2"):
        quickstart.run_stage("merge_dpo", ["merge_peft_adapter.py", "--adapter_model_name", "nowhere"], 6)
    shown = capfd.readouterr()
    assert "merge_peft_adapter.py --adapter_model_name nowhere" in shown.out
    assert shown.err.startswith("merge_peft_adapter.py: error:")
    assert shown.err.count("\n") == 1
