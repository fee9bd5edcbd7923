"""A rank of tests/test_multi_rank.py: runs of sft.py and dpo.py one after the other, as their imports take longest.

training_ranks.py RUNS.json, which lists [name, script, flags], writes the weights that each run has trained to
NAME.RANK.safetensors.
"""

import importlib
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import transformers.trainer
from safetensors.torch import save_file
from transformers import TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config


class SaveWeights(TrainerCallback):
    """Saves what this rank holds in the end, whether or not the script would."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        gathered = nullcontext()
        if is_deepspeed_zero3_enabled():
            import deepspeed

            assert all(weight.numel() == 0 for weight in trained.values()), "ZeRO-3 holds nothing whole"
            gathered = deepspeed.zero.GatheredParameters(list(trained.values()))
        with gathered:
            tensors = {name: weight.detach().cpu().float().contiguous().clone() for name, weight in trained.items()}
        save_file(tensors, f"{NAME}.{os.environ.get('RANK', '0')}.safetensors")


if __name__ == "__main__":
    transformers.trainer.DEFAULT_CALLBACKS.append(SaveWeights)
    for NAME, script, flags in json.loads(Path(sys.argv[1]).read_text()):  # noqa: B007 - SaveWeights reads NAME
        sys.argv = [script, *flags]
        importlib.import_module(script.removesuffix(".py")).main()
        unset_hf_deepspeed_config()
