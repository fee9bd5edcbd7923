"""Talking to models in the terminal: history, Ctrl-C, two models side by side.

Run: pytest tests/test_chat.py
"""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from tiny import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.data.formats import recognise
from align.data.tokenization import SampleTokenizer
from align.errors import InputError
from align.generation import chat
from align.generation.chat import ChatArguments, load_speakers
from align.generation.config import DecodingArguments, GaudiArguments
from align.generation.model import ModelArguments


def ask_plain_transformers(folder, messages):
    """The greedy answer of 12 tokens to the conversation so far."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    else:
        ids = tokenizer(chat.word_questions(messages), return_tensors="pt").input_ids
    output = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def speakers_of(folder, compare=None, **decoding):
    decoding = DecodingArguments(**{"max_new_tokens": 12, **decoding})
    model = ModelArguments(model_name_or_path=str(folder))
    return load_speakers(ChatArguments(chat=True, compare=compare and str(compare)), model, decoding, GaudiArguments())


@pytest.mark.parametrize("tokenizer", ["qwen", "gpt2", "llama-2"])
def test_an_answer_is_that_of_plain_transformers_to_the_whole_conversation(tmp_path, capsys, tokenizer):
    folder = save_model(tmp_path / "model", tokenizer=tokenizer)
    (speaker,) = speakers_of(folder)
    messages = []
    for question in ("How are you?", "And the capital of France?"):
        messages.append({"role": "user", "content": question})
        expected = ask_plain_transformers(folder, messages)
        speaker.answer(question)
        assert expected.strip() in capsys.readouterr().out
        messages.append({"role": "assistant", "content": expected.strip()})
    assert speaker.messages == messages


@pytest.mark.parametrize("kind", ["gpt2", "llama-2"])
def test_without_a_chat_template_a_question_is_asked_as_training_asked_it(tmp_path, kind):
    folder = save_model(tmp_path / "model", tokenizer=kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    row, samples = {"question": "Why?", "answer": "So."}, SampleTokenizer(tokenizer)
    sample = recognise(row, preference=False).read(row, False)
    ids, learnt, _ = samples.encode([samples.render(sample)])[0]
    (speaker,) = speakers_of(folder)
    assert speaker.encode([{"role": "user", "content": "Why?"}]) == ids[~learnt].tolist()


def test_a_text_that_a_stop_string_ends_is_not_called_cut(tmp_path, capsys):
    folder = save_model(tmp_path / "model", tokenizer="qwen")
    ends = {"stop_strings": list("abcdefghijklmnopqrstuvwxyz "), "eos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    (speaker,) = speakers_of(folder, max_new_tokens=60)
    speaker.answer("How are you?")
    assert "cut at" not in capsys.readouterr().out


def test_an_adapter_talks_on_its_own_base_beside_it(tmp_path):
    base = save_model(tmp_path / "base", tokenizer="qwen")
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    tuned, plain = speakers_of(tmp_path / "adapter", compare=base)
    assert [speaker.name for speaker in (tuned, plain)] == [str(tmp_path / "adapter"), str(base)]
    weights = [speaker.generator.model.model.layers[0].mlp.up_proj.weight for speaker in (tuned, plain)]
    assert not weights[0].equal(weights[1])


def test_the_oldest_turns_are_forgotten_where_the_context_is_full_and_that_is_said(tmp_path, capsys):
    folder = save_model(tmp_path / "model", tokenizer="qwen", max_position_embeddings=96)
    (speaker,) = speakers_of(folder)
    for _ in range(4):
        speaker.answer("How are you today?")
    assert "no longer fit its context and are forgotten" in capsys.readouterr().out
    assert speaker.messages[0]["role"] == "user"
    held = list(speaker.messages)
    speaker.answer("How are you today? " * 30)
    assert re.search(r"That is \d+ tokens; the model's context leaves room for 84", capsys.readouterr().out)
    assert speaker.messages == held


def test_commands_are_not_sent_to_the_model(tmp_path, monkeypatch, capsys):
    speakers = speakers_of(save_model(tmp_path / "model", tokenizer="qwen"))
    lines = iter(["Hello there", "/new", "/nonsense", "", "/bye", "never read"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat.talk(speakers)
    assert speakers[0].messages == []
    assert next(lines) == "never read"
    assert capsys.readouterr().out.count(chat.HELP) == 2


def test_a_pipe_gets_a_plain_transcript_and_is_told_which_line_is_no_text(tmp_path, monkeypatch):
    speakers = speakers_of(save_model(tmp_path / "model", tokenizer="qwen"))
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfHello\nGr\xfc\xdfe\n"), "utf-8"))
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, "ascii", write_through=True))
    chat.talk(speakers)
    shown = written.getvalue().decode("ascii")
    assert shown.startswith(f"{chat.HELP}\n>>> Hello\n")
    assert shown.endswith(">>> Gr\\udcfc\\udcdfe\nThat is not text in utf-8; nothing is asked.\n\n")
    assert "\33" not in shown
    assert [message["content"] for message in speakers[0].messages[::2]] == ["Hello"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compare", "other"], "add --chat"),
        (["--chat", "--prompt", "Hello"], "--prompt: has no effect in a conversation"),
        (["--chat", "--output_dir", "out"], "--output_dir: has no effect in a conversation"),
        (["--chat", "--show_graphs_count"], "--show_graphs_count: has no effect in a conversation"),
        (["--chat", "--num_return_sequences", "2"], "--num_return_sequences: has no effect in a conversation"),
        (["--chat", "--num_beams", "2"], "--num_beams: has no effect in a conversation"),
        (["--chat", "--max_new_tokens", "512"], "--max_new_tokens: 512 leave no room"),
        (["--chat", "--compare", "nowhere"], "nowhere"),
    ],
)
def test_flags_that_do_not_go_with_a_conversation_are_refused(tmp_path, run, flags, message):
    folder = save_model(tmp_path / "model", tokenizer="qwen")
    with pytest.raises(InputError, match=message):
        run("run_generation.py", "--model_name_or_path", folder, *flags)


def test_a_tokenizer_of_another_model_is_told_before_the_model_is_tried(tmp_path):
    folder = save_model(tmp_path / "model", tokenizer="qwen", vocab_size=300)
    with pytest.raises(InputError, match="beyond the model's vocabulary of 300"):
        speakers_of(folder)


class Terminal:
    """A program in a terminal of its own, that a test types into and reads from."""

    def __init__(self, *command):
        self.keyboard, end = pty.openpty()
        self.process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end, start_new_session=True)
        os.close(end)
        self.shown = ""

    def type(self, text):
        os.write(self.keyboard, text.encode())

    def press_ctrl_c(self):
        os.killpg(self.process.pid, signal.SIGINT)

    def wait_for(self, pattern, seconds=120, again=lambda: None):
        """Waits until the pattern was shown since the last call; after each second of silence it calls `again`."""
        until = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown, re.DOTALL)):
            assert time.monotonic() < until, self.shown
            if not select.select([self.keyboard], [], [], 1)[0]:
                again()
                continue
            try:
                self.shown += os.read(self.keyboard, 4096).decode(errors="replace")
            except OSError as error:  # the program has ended
                raise AssertionError(self.shown) from error
        self.shown = self.shown[found.end() :]


def test_in_a_terminal_both_models_answer_and_ctrl_c_stops_an_answer_not_the_program(tmp_path):
    names = [str(save_model(tmp_path / name, tokenizer="qwen", seed=seed)) for seed, name in enumerate(("old", "new"))]
    command = ["--model_name_or_path", names[0], "--chat", "--compare", names[1], "--max_new_tokens", "400"]
    terminal = Terminal(sys.executable, ROOT / "run_generation.py", *command)
    try:
        terminal.wait_for(">>> ")
        terminal.type("\33[200~Hello there,\nhow are you?\33[201~\n")  # pasted: one question of two lines
        terminal.wait_for(rf"{re.escape(names[0])}.*?\n.{{3}}")  # the first words are there while it goes on
        terminal.press_ctrl_c()
        terminal.wait_for(rf"\(stopped\).*{re.escape(names[1])}.*?\n.{{3}}")
        terminal.press_ctrl_c()
        terminal.wait_for(r"\(stopped\).*>>> ")
        terminal.press_ctrl_c()  # with nothing to stop it tells how to end
        # Python's input() loses a signal that comes between the prompt and the wait for a key
        terminal.wait_for("Ctrl-D ends it.*>>> ", again=terminal.press_ctrl_c)
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()
