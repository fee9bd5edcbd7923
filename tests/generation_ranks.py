"""A rank of tests/test_run_generation.py: run_generation.py with one model after the other, whose imports take longest.

generation_ranks.py FOLDER... -- PROMPT... writes to a folder with each model's name.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from align.cli import run_script
from run_generation import main


def answer() -> None:
    end = sys.argv.index("--")
    flags = "--batch_size 8 --max_new_tokens 20 --use_hpu_graphs --bf16 False".split()
    for model in sys.argv[1:end]:
        paths = ["--model_name_or_path", model, "--output_dir", Path(model).name]
        main([*paths, *flags, "--prompt", *sys.argv[end + 1 :]])


if __name__ == "__main__":
    run_script(answer)
