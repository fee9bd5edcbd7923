"""One of two ranks that share the model of each row after the other. Run by tests/measure_families.py.

family_ranks.py FOLDER ROW... writes to FOLDER/ranks.json what became of the texts of each row.
"""

import json
import math
import os
import sys
from pathlib import Path

from family_models import CONFIGS
from measure_families import PROMPTS, draw, generate, judge, load_for_texts

from align.cli import run_script
from align.generation.model import check_shares
from align.merge.checkpoints import open_checkpoint
from align.models.families import find_split_fault
from align.models.guard import load_config
from align.upstream_fixes import adapt_transformers


def answer() -> None:
    adapt_transformers()
    root, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    prompts = [draw(length, 1) for length in PROMPTS]
    cells = {}
    for row in sys.argv[2:]:
        folder = root / str(list(CONFIGS).index(row))
        config = load_config(folder, "--model_name_or_path")

        sizes = []

        def attempt(folder=folder, config=config, sizes=sizes) -> list[list[int]]:
            check_shares(config, 2)
            model = load_for_texts(folder, world_size=2, rank=rank)
            sizes.append(model.num_parameters())
            return generate(model, prompts)

        found = judge(attempt, json.loads((folder / "plain.json").read_text())["answers"])
        whole = sum(math.prod(tensor.shape) for tensor in open_checkpoint(folder).tensors.values())
        is_whole = find_split_fault(config) or (sizes and sizes[0] >= whole)
        cells[row] = f"{found}, not split" if is_whole else found
    if rank == 0:
        (root / "ranks.json").write_text(json.dumps(cells))


if __name__ == "__main__":
    run_script(answer)
