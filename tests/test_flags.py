"""Every flag of the trainers has an effect, or is refused. Run: pytest tests/test_flags.py"""

import ast
import dataclasses
from pathlib import Path

import accelerate
import optimum.habana
import pytest
import transformers
import trl
from optimum.habana.trl import GaudiDPOConfig, GaudiSFTConfig

from align.errors import InputError
from align.training.unused import WITHOUT_EFFECT, check_unused, get_default

ROOT = Path(__file__).parent.parent
CONFIGS = {"sft.py": GaudiSFTConfig, "dpo.py": GaudiDPOConfig}
NOT_FLAGS = {"_n_gpu"}  # made by transformers itself


def find_readers():
    """Files that a training run goes through."""
    habana, hf, other = (Path(package.__file__).parent for package in (optimum.habana, transformers, trl))
    yield from (habana / "transformers").glob("train*.py")
    yield from (habana / "trl" / "trainer").glob("*.py")
    yield from hf.glob("train*.py")
    yield from (hf / "integrations").glob("*.py")
    yield from (other / "trainer").glob("*.py")
    yield from Path(accelerate.__file__).parent.glob("*.py")
    yield from (ROOT / "align").rglob("*.py")
    yield from (ROOT / script for script in CONFIGS)


@pytest.fixture(scope="module")
def read():
    """Names that some file reads as an attribute, or hands on as a keyword."""
    names = set()
    for path in find_readers():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
            elif isinstance(node, ast.keyword) and node.arg:
                names.add(node.arg)
    return names


@pytest.mark.parametrize("script", CONFIGS)
def test_every_flag_is_read_by_somebody_or_refused(script, read):
    flags = {each.name for each in dataclasses.fields(CONFIGS[script])} - NOT_FLAGS
    assert flags - read - WITHOUT_EFFECT.keys() == set()


def test_the_table_names_no_flag_that_does_not_exist():
    known = {each.name for config in CONFIGS.values() for each in dataclasses.fields(config)}
    assert WITHOUT_EFFECT.keys() <= known


@pytest.mark.parametrize("script", CONFIGS)
def test_each_flag_without_effect_is_refused_with_what_to_use(script):
    args = CONFIGS[script](output_dir="out", use_habana=True, use_lazy_mode=True)
    check_unused(args)  # none of them where nobody gives it
    for each in dataclasses.fields(args):
        if each.name in WITHOUT_EFFECT:
            before = getattr(args, each.name)
            default = get_default(each)
            setattr(args, each.name, not default if isinstance(default, bool) else "other")
            with pytest.raises(InputError, match=f"--{each.name} has no effect here: .+"):
                check_unused(args)
            setattr(args, each.name, before)


@pytest.mark.parametrize("flags", ["--group_by_length", "--eval_packing False", "--data_seed 3", "--fsdp full_shard"])
def test_a_flag_without_effect_stops_sft_before_anything_is_loaded(run, flags):
    with pytest.raises(InputError, match=f"^{flags.split()[0]} has no effect here"):
        run("sft.py", "--output_dir", "out", "--do_train", "--model_name_or_path", "none", *flags.split())
    assert not Path("out").exists()
