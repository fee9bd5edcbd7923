"""Models without weights, made to look whole: a safetensors header from `config.json`, and a hole where the data was.

A hole takes no place on the disk. Shapes, names and sizes are the model's own, so whatever reads headers goes on as
with the real files.
"""

import hashlib
from pathlib import Path

import torch

from align.errors import InputError
from align.merge.checkpoints import find_folder
from align.models.guard import check_folder, load_config

FLAGS = ("--model_name_or_path", "--base_model_name", "--ref_model")
WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json")


def fill_in(arguments: list[str], folder: Path) -> list[str]:
    """The arguments, with each model that has a configuration but no weights replaced by one that looks whole."""
    filled, flag = [], None
    for argument in arguments:
        name, equals, value = argument.partition("=") if argument.startswith("--") else (flag, "", argument)
        flag = argument if argument.startswith("--") and not equals else None
        if name in FLAGS and value and flag is None:
            value = str(look_whole(value, folder, name) or value)
            argument = f"{name}={value}" if equals else value
        filled.append(argument)
    return filled


def look_whole(name: str, folder: Path, flag: str) -> Path | None:
    """The model that `flag` names: a folder with its small files and a hole for its weights.

    None where it needs none, or is no model.
    """
    try:
        source = find_folder(name, flag, "*.json", "*.txt", "*.model", "*.jinja")
    except InputError:
        return None  # the script itself says what is wrong
    if not (source / "config.json").is_file() or any(next(source.glob(pattern), None) for pattern in WEIGHTS):
        return None
    made = folder / f"{Path(name).name}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    if not made.exists():
        made.mkdir(parents=True)
        for path in source.iterdir():
            if path.is_file():
                (made / path.name).symlink_to(path.resolve())
        write_hole(made, flag)
    return made


def write_hole(folder: Path, flag: str) -> None:
    from safetensors.torch import save_file  # the dry card's, which writes a header and a hole
    from transformers import AutoModelForCausalLM

    check_folder(folder, flag)
    config = load_config(folder, flag)
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    with torch.device("meta"):
        model = model_class(config).to(config.torch_dtype or torch.bfloat16)
    tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
