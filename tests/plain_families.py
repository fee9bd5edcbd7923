"""Log-probs and greedy answers of plain transformers; run by tests in a process that optimum-habana has not patched.

python plain_families.py FOLDER makes FOLDER/<number of the row> for each row of the table, with a tiny model and in
`plain.json` the logits of the samples and what the model answers to the prompts, each alone, without cache.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from family_models import CONFIGS, save_family_model
from transformers import AutoModelForCausalLM

LENGTHS = (24, 17, 5)  # of samples: longer and shorter than a window of 8
PROMPTS = (19, 7, 1)
PAIR = (12, 9, 7)  # prompt, chosen, rejected
NEW_TOKENS = 8


def draw(*seed: int) -> list[int]:
    """As many ids as the first number says."""
    return np.random.default_rng(seed).integers(3, 512, seed[0]).tolist()


def draw_pair() -> tuple[list[int], list[int], list[int]]:
    return tuple(draw(length, 7) for length in PAIR)


def sequences() -> list[list[int]]:
    prompt, chosen, rejected = draw_pair()
    return [*map(draw, LENGTHS), prompt + chosen, prompt + rejected]


@torch.no_grad()
def compute(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", torch_dtype=torch.float32).eval()

    def logits(ids: list[int]) -> torch.Tensor:
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]

    answers = []
    for length in PROMPTS:
        ids = draw(length, 1)
        for _ in range(NEW_TOKENS):
            ids = [*ids, logits(ids)[-1].argmax().item()]
        answers.append(ids[length:])
    beams = []
    for length in PROMPTS:
        ids = torch.tensor([draw(length, 1)])
        options = {"num_beams": 2, "max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0}
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
        beams.append(found[0, length:].tolist())
    logits = [logits(ids).log_softmax(-1).tolist() for ids in sequences()]
    result = {"logits": logits, "answers": answers, "beams": beams}
    (folder / "plain.json").write_text(json.dumps(result))


if __name__ == "__main__":
    for number, row in enumerate(CONFIGS):
        if len(sys.argv) == 2 or row in sys.argv[2:]:
            compute(save_family_model(Path(sys.argv[1]) / str(number), row))
