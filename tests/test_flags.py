"""Every flag of the trainers has an effect, or is refused. Run: pytest tests/test_flags.py"""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import accelerate
import optimum.habana
import pytest
import transformers
import trl
from optimum.habana.trl import GaudiDPOConfig, GaudiSFTConfig

from align.errors import InputError
from align.training.preference import PreferenceTrainer
from align.training.supervised import SupervisedTrainer
from align.training.unused import BESIDE_OTHERS, WITHOUT_EFFECT, check_unused, get_default

ROOT = Path(__file__).parent.parent
CONFIGS = {"sft.py": GaudiSFTConfig, "dpo.py": GaudiDPOConfig}
NOT_FLAGS = {"_n_gpu"}  # made by transformers itself


TRAINERS = (SupervisedTrainer, PreferenceTrainer)
READ_BY_THEMSELVES = ("training_args.py", "sft_config.py", "dpo_config.py")  # which check values, and may do no more
SET_BY_THEMSELVES = {  # flags that those files turn into something else
    *(
        "adafactor",
        "per_gpu_train_batch_size",
        "per_gpu_eval_batch_size",
        "warmup_ratio",
        "ddp_timeout",
        "log_level_replica",
    ),
    *("log_on_each_node", "torch_compile_mode", "cache_size_limit", "inline_inbuilt_nn_modules", "compile_dynamic"),
    *("allow_unspec_int_on_nn_module", "flash_attention_fast_softmax", "gaudi_config_name"),
}


def find_live_code():
    """The code that a training run goes through: of the trainers, methods that nobody replaces without calling them."""
    habana, hf, other = (Path(package.__file__).parent for package in (optimum.habana, transformers, trl))
    files = [*(habana / "transformers").glob("train*.py"), *hf.glob("train*.py"), *(hf / "integrations").glob("*.py")]
    files += [other / "trainer" / "utils.py", *Path(accelerate.__file__).parent.glob("*.py")]
    files += [*(ROOT / "align").rglob("*.py"), *(ROOT / script for script in CONFIGS)]
    classes = {each for trainer in TRAINERS for each in trainer.__mro__ if each is not object}
    of_classes = {Path(inspect.getfile(each)) for each in classes}
    for path in files:
        if path.name not in READ_BY_THEMSELVES and path not in of_classes:
            yield ast.parse(path.read_text(encoding="utf-8"))
    for trainer in TRAINERS:
        replaced: set[str] = set()
        for each in trainer.__mro__[:-1]:
            for name, method in vars(each).items():
                method = getattr(method, "__func__", getattr(method, "fget", method))
                if name not in replaced and inspect.isfunction(inspect.unwrap(method)):
                    source = textwrap.dedent(inspect.getsource(inspect.unwrap(method)))
                    yield ast.parse(source)
                    replaced |= set() if f").{name}(" in source else {name}


@pytest.fixture(scope="module")
def read():
    """Names that live code reads as an attribute, or hands on as a keyword."""
    names = set()
    for node in (node for code in find_live_code() for node in ast.walk(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            names.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            names.add(node.arg)
    return names | SET_BY_THEMSELVES


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


REFUSED = [
    "--group_by_length",
    "--eval_packing False",
    "--data_seed 3",
    "--remove_unused_columns True",
    "--fsdp full_shard",
    "--use_legacy_prediction_loop",
]


@pytest.mark.parametrize("flags", REFUSED)
def test_a_flag_without_effect_stops_sft_before_anything_is_loaded(run, flags):
    with pytest.raises(InputError, match=f"^{flags.split()[0]}.* has no effect here"):
        run("sft.py", "--output_dir", "out", "--do_train", "--model_name_or_path", "none", *flags.split())
    assert not Path("out").exists()


IN_VAIN = {  # flags that change nothing beside the others
    "sft.py": "--use_peft False --lora_r 4 --max_steps 3 --num_train_epochs 2 --warmup_steps 1 --warmup_ratio 0.1 "
    "--eval_steps 5 --pad_max True --num_buckets 3 --optim sgd --adam_beta1 0.8 "
    "--save_strategy no --save_steps 7 --save_total_limit 2 --run_name mine --max_eval_samples 4 "
    "--ddp_bucket_cap_mb 10 --ddp_timeout 60 --distribution_strategy fast_ddp",
    "dpo.py": "--warmup_ratio 0.1 --f_alpha_divergence_coef 0.5 --ref_model_sync_steps 4 --ref_log_probs_dir stored "
    "--average_tokens_across_devices False",
}
NOT_IN_VAIN = {"--use_peft", "--max_steps", "--warmup_steps", "--optim", "--save_strategy"}


@pytest.mark.parametrize("script", IN_VAIN)
def test_a_flag_that_changes_nothing_beside_the_others_is_told(script, run, capsys):
    with pytest.raises(InputError, match="none"):
        run(script, "--output_dir", "out", "--do_train", "--model_name_or_path", "none", *IN_VAIN[script].split())
    told = re.findall(r"WARNING (--\w+) has no effect here: .+", capsys.readouterr().err)
    assert set(told) == set(re.findall(r"--\w+", IN_VAIN[script])) - NOT_IN_VAIN


@pytest.mark.parametrize(("more", "told"), [([], 0), (["--eval_steps", 5], 1)])
def test_the_interval_of_the_log_is_in_vain_only_where_no_evaluation_takes_it(run, capsys, more, told):
    flags = ["--do_eval", "--logging_strategy", "no", "--logging_steps", 3, "--eval_strategy", "steps", *more]
    with pytest.raises(InputError, match="none"):
        run("sft.py", "--output_dir", "out", "--do_train", "--model_name_or_path", "none", *flags)
    assert capsys.readouterr().err.count("--logging_steps has no effect here") == told


def test_the_table_of_flags_beside_others_names_no_flag_that_does_not_exist():
    known = {
        each.name
        for script in CONFIGS
        for part in importlib.import_module(script[:-3]).ARGUMENTS
        for each in dataclasses.fields(part)
    }
    assert BESIDE_OTHERS.keys() <= known
