"""What a run leaves to be read by people. Run: pytest tests/test_report.py"""

import json
import re
from concurrent.futures import Future
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import write_rows
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from test_dpo import make_rows
from tiny import save_model

from align.errors import InputError, ResultError
from align.training.report import POINTS, Axis, chart, find_curves, make_card, render
from align.training.samples import find_prompts

COMMON = "--bf16 False --disable_tqdm True --do_eval --eval_strategy steps --logging_steps 1 --max_steps 4".split()
COMMON += "--eval_steps 2 --sample_prompts 2 --learning_rate 1e-2 --save_strategy no --token hf_SECRET".split()
SCRIPTS = {
    "sft.py": "--do_train --max_seq_length 64 --per_device_train_batch_size 2 --size_valid_set 10",
    "dpo.py": "--max_prompt_length 48 --max_length 96 --warmup_steps 0 --size_valid_set 10 --hub_token=hf_SECRET2",
}


@pytest.fixture
def train(run, tmp_path):
    save_model(tmp_path / "model")
    rows = make_rows(40)
    rows[3]["response_j"] = rows[3]["response_j"] * 20  # is cut
    rows[5]["question"] = "<script>alert(1)</script> What is 5?"
    write_rows(tmp_path / "rows.jsonl", rows)

    def train(script, *flags):
        paths = ["--model_name_or_path", "model", "--dataset_name", "rows.jsonl", "--output_dir", "out"]
        return run(script, *COMMON, *SCRIPTS[script].split(), *paths, *flags)

    return train


class Outline(HTMLParser):
    """Which tags a page has, what they refer to, and its text by lines."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.refers, self.open, self.text = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.refers += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_leaves_one_page_and_a_card_with_its_facts_and_no_token(train, script):
    said = train(script).out

    page, card = (Path("out", name).read_text() for name in ("report.html", "README.md"))
    outline, text = Outline(page), " ".join(Outline(page).text)
    assert outline.open == [], "an element is not closed"
    assert {"script", "link", "img"}.isdisjoint(outline.tags)
    assert outline.refers == []
    history = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert page.count("<title>loss, step ") == len(losses) == 4
    assert f"<title>loss, step 4: {losses[-1]:.6g}</title>" in page
    assert "eval_loss" in text
    assert re.search(r"tensors with [\d,]+ values read back: whole, finite, equal to memory; (\d+) of \1 trained", text)
    assert ("rewards/margins" in text) == (script == "dpo.py")
    assert "1 " in text[text.index(" cut ") :][:20]
    for shown in ("optimum-habana", "--max_steps 4", "learning_rate", "steps a second", "GB of a card's memory"):
        assert shown in text, shown
    header = ModelCard(card).data.to_dict()
    assert header["library_name"] == "peft"
    assert "base_model" not in header, "a folder is no name on the Hub"
    assert "read back: whole, finite" in card
    for when in ("before", "after"):
        answers = re.findall(rf"\[{when}\] .*\n(?:(?!\[)|)(.*)", said)
        assert len(answers) == 2
    assert "hf_SECRET" not in page + card
    kept = [path for path in Path("out").rglob("*") if path.is_file() and b"hf_SECRET" in path.read_bytes()]
    assert kept == []


FACTS = {
    "script": "dpo.py",
    "model": "org/base",
    "reference": None,
    "datasets": ["org/pairs", "data/own.jsonl"],
    "is_adapter": False,
    "output": "a: b",
    "steps": 5,
    "epochs": 0.5,
    "ranks": 8,
    "sharing": "ZeRO-3",
    "results": {"evaluation loss": "0.5"},
    "peak_gb": 1.5,
    "data": {"train": {"left out": "3 bad | row", "<s> within the text": "2"}},
    "gate": "3 tensors",
    "left_out": 1,
    "resumed": None,
    "command": "dpo.py --columns 'a=```\nb'",
    "flags": {"loss_type": "sigmoid"},
    "versions": {"torch": "2"},
    "prompts": ["<b>?\n---\n# no"],
    "answers": {"before": ["</pre><script>x</script>"], "after": [""]},
}


def test_a_card_names_what_is_on_the_hub_and_a_page_shows_text_as_text():
    write_rows(Path("data/own.jsonl"), [])
    header = ModelCard(make_card(FACTS)).data.to_dict()
    page = render(FACTS, [], {})

    assert (header["base_model"], header["datasets"]) == ("org/base", ["org/pairs"])
    assert "script" not in Outline(page).tags
    assert "</pre><script>x</script>" in "".join(Outline(page).text)
    assert "8 cards under ZeRO-3" in page
    card = make_card(FACTS)
    assert "1 steps were not finite" in card
    assert "| &lt;s&gt; within the text | 2 |" in card
    assert "    dpo.py --columns 'a=```\n    b'\n" in card, "indented, so that no text ends the block"


def test_prompts_without_room_for_an_answer_are_not_asked(caplog):
    rows = [{"prompt_input_ids": [1] * length} for length in (33, 32, 2)]
    assert list(map(len, find_prompts(rows, 3, longest=64))) == [32, 2]
    assert "--sample_prompts 3: 2 held-out prompts have at most 32 tokens" in caplog.text


def test_curves_of_any_length_and_height_are_drawn_within_their_plane():
    long = [{"step": step, "loss": 1 / step} for step in range(1, 10_001)]
    curve = find_curves([*long, {"step": 7, "loss": float("nan")}], ["loss"])["loss"]
    assert POINTS / 2 < len(curve) <= POINTS
    assert curve[-1] == (10_000, 1e-4)

    for values in ([0.0], [5.0, 5.0], [1e-30, 2e-30], [-1e9, 1e9], [0.1, 0.1 + 1e-12]):
        axis = Axis(values, 0, 100)
        assert all(0 <= axis(value) <= 100 for value in (*values, *axis.ticks))
        assert chart("any", {"loss": list(enumerate(values))})


class Hub:
    """Takes uploads as the Hub does, into folders of its own; `fails` is what it answers instead."""

    def __init__(self, fails=None):
        self.fails, self.uploads = fails, []

    def upload_folder(self, *, folder_path, commit_message, allow_patterns=None, ignore_patterns=None, **options):
        job = Future()
        names = [str(path.relative_to(folder_path)) for path in sorted(Path(folder_path).rglob("*")) if path.is_file()]
        kept = filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        self.uploads.append((commit_message, options.get("path_in_repo"), set(kept)))
        job.set_exception(self.fails) if self.fails else job.set_result("url")
        return job


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: {"name": "me"})
    monkeypatch.setattr("transformers.trainer.create_repo", lambda name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr("huggingface_hub.upload_folder", hub.upload_folder)
    return hub


PUSH = "--push_to_hub --hub_model_id me/model --save_strategy steps --save_steps 2".split()


def test_the_model_its_card_and_results_are_uploaded_and_no_row_no_token_and_no_optimizer(train, hub):
    Path("out").mkdir()
    Path("out/examples.html").write_text("rows")

    train("sft.py", *PUSH, "--hub_strategy", "checkpoint", "--hub_token", "hf_SECRET", "--overwrite_output_dir")

    while_training, whole, final = hub.uploads[0][2], hub.uploads[1], hub.uploads[-1][2]
    assert "adapter_model.safetensors" in while_training & whole[2] & final
    assert {"optimizer.pt", "trainer_state.json"} < whole[2] - while_training
    assert whole[1] == "last-checkpoint"
    assert {"README.md", "report.html", "train_results.json", "adapter_config.json", "tokenizer.json"} < final
    assert not {name for name in final if re.search("examples|checkpoint-|bad_batch|training_args|lock", name)}
    assert not Path("out/training_args.bin").exists()
    assert all(b"hf_SECRET" not in path.read_bytes() for path in Path("out").rglob("*") if path.is_file())


def test_an_upload_that_fails_is_told_and_the_run_does_not_end_as_if_all_went_well(train, hub):
    hub.fails = OSError("503 Server Error")

    with pytest.raises(ResultError, match="the model is saved in out but not uploaded to me/model: 503 Server Error"):
        train("sft.py", *PUSH)

    assert Path("out/adapter_model.safetensors").exists()


def test_a_name_for_the_hub_is_refused_where_nothing_is_uploaded(train):
    with pytest.raises(InputError, match="--hub_model_id has no effect here: nothing is uploaded without"):
        train("sft.py", "--hub_model_id", "me/model")


def test_no_login_for_an_upload_is_one_line_before_a_model_loads(train):
    with pytest.raises(InputError, match="--push_to_hub: me/model: "):
        train("sft.py", *PUSH, "--model_name_or_path", "nowhere")
