"""The tutorial's commands, one after the other as they stand there. Run: pytest -m soak tests/test_tutorial.py"""

import re
import shlex
import subprocess
import sys

import pytest
import tiny
from conftest import ROOT

PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
MODEL = "meta-llama/Llama-3.1-8B-Instruct"


def run_command(command: str) -> None:
    """As a reader would, with a tiny model in place of the page's, and two ranks that train once more for its eight."""
    words = [word.replace(MODEL, "model") for word in shlex.split(command)]
    if words[0] != "python":
        return
    if re.search(r"--world_size 8\b", command):
        words[words.index("--world_size") + 1] = "2"
        words.append("--overwrite_output_dir")
    process = [sys.executable, *(str(ROOT / word) if word.endswith(".py") else word for word in words[1:])]
    ended = subprocess.run(process, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{command}\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}"


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_tutorial_leads_from_a_table_of_questions_to_an_aligned_model(tmp_path, monkeypatch):
    tiny.save_model(tmp_path / "model", max_position_embeddings=2048)
    table = re.search(r"^```\n(question,answer\n.*?)^```", PAGE, re.DOTALL | re.MULTILINE)[1]
    table += "".join(f"What is {number} plus one?,It is {number + 1}.\n" for number in range(20))
    (tmp_path / "questions.csv").write_text(table, encoding="utf-8-sig")  # as Excel saves it
    (tmp_path / "held_out.txt").write_text("What is two plus two?\nWho are you?\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PT_HPU_LAZY_MODE", "1")
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE):
        if language == "python":
            exec(block, {})
        for command in block.replace("\\\n", " ").splitlines() if language == "bash" else ():
            run_command(command)
    pairs = (tmp_path / "pairs.csv").read_text(encoding="utf-8").splitlines()
    assert pairs[0] == "question,chosen,rejected"
    assert len(pairs) > 20
    assert (tmp_path / "aligned" / "model.safetensors").exists()
    assert len((tmp_path / "answers_dpo" / "generations.jsonl").read_text().splitlines()) == 2
