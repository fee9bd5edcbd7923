"""Log-probs and greedy answers of plain transformers; run by tests in a process that optimum-habana has not patched.

python plain_families.py FOLDER makes FOLDER/<number of the row> for each row of the table, with a tiny model and in
`plain.json` the logits of the samples and what the model answers to the prompts, each alone, without cache. Beside it
`adapter` is one on every linear module, `merged.safetensors` what PEFT's merge makes of all tensors, and `whole` what
merge_peft_adapter.py makes of them where it cannot stream.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from family_models import CONFIGS, WITH_A_STATE, save_family_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from align.merge.writing import merge_through_peft

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
        options["use_cache"] = model._supports_default_dynamic_cache()  # other caches do not follow their beams
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
        beams.append(found[0, length:].tolist())
    logits = [logits(ids).log_softmax(-1).tolist() for ids in sequences()]
    result = {"logits": logits, "answers": answers, "beams": beams}
    (folder / "plain.json").write_text(json.dumps(result))
    merge(model, folder)


def merge(model, folder: Path) -> None:
    """All linear modules and, where no head shares it, the embedding; PEFT refuses Mamba's `out_proj`."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    adapted = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    }
    if model.config.model_type in WITH_A_STATE:
        adapted = {name: module for name, module in adapted.items() if not name.endswith("out_proj")}
    elif not model.config.tie_word_embeddings:
        adapted |= {name: module for name, module in model.named_modules() if module is embedding}
    config = LoraConfig(r=2, target_modules=list(adapted), init_lora_weights=False, task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config)
    peft_model.save_pretrained(folder / "adapter")
    tensors = peft_model.merge_and_unload().state_dict()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "merged.safetensors")
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    (folder / "whole").mkdir()
    merge_through_peft(folder, model.config, folder / "adapter", settings, folder / "whole", None)


if __name__ == "__main__":
    for number, row in enumerate(CONFIGS):
        if len(sys.argv) == 2 or row in sys.argv[2:]:
            compute(save_family_model(Path(sys.argv[1]) / str(number), row))
