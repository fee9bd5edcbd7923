"""A rank of tests/test_run_generation.py: run_generation.py with one model after the other, whose imports take longest.

generation_ranks.py FOLDER... -- PROMPT... writes to a folder with each model's name. The first one's answers are then
lost but for those of one batch, and made again with --resume; and written to `spoilt` with a fault in the last rank's
class.
"""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from test_probing import let_the_mask_leak

from align.cli import run_script
from run_generation import main


def answer() -> None:
    end = sys.argv.index("--")
    flags = "--batch_size 3 --max_new_tokens 20 --use_hpu_graphs --bf16 False".split()
    for model in sys.argv[1:end]:
        paths = ["--model_name_or_path", model, "--output_dir", Path(model).name]
        main([*paths, *flags, "--prompt", *sys.argv[end + 1 :]])
        if model == sys.argv[1]:
            if os.environ["RANK"] == "0":
                lose_answers(Path(model).name)
            main([*paths, *flags, "--resume", "--prompt", *sys.argv[end + 1 :]])
            with pytest.MonkeyPatch.context() as patch:
                if os.environ["RANK"] == "1":
                    let_the_mask_leak(patch)
                paths = ["--model_name_or_path", model, "--output_dir", "spoilt"]
                main([*paths, *flags, "--prompt", *sys.argv[end + 1 :]])


def lose_answers(folder: str) -> None:
    """As if the run had been killed after the batch of the three shortest prompts."""
    finished = Path(folder, "generations.jsonl")
    answers = [json.loads(line) for line in finished.read_text().splitlines()]
    shortest = sorted(range(len(answers)), key=lambda place: len(answers[place]["prompt"]))[:3]
    rows = [json.dumps({"number": place + 1} | answers[place]) + "\n" for place in shortest]
    finished.with_name("generations.unfinished.jsonl").write_text("".join(rows))
    finished.unlink()


if __name__ == "__main__":
    run_script(answer)
