"""Optimizers, schedules, loggers: they do as they say, or stop first. Run: pytest tests/test_optimizers.py"""

import importlib.util
import json
from pathlib import Path

import pytest
from conftest import write_rows
from tiny import save_model
from transformers.training_args import OptimizerNames

from align.errors import InputError
from align.training.optimizers import OF_TORCH, SAME_AS_FUSED_ADAMW

NOWHERE = ["--model_name_or_path", "nowhere", "--dataset_name", "rows.jsonl", "--output_dir", "out", "--do_train"]


NOTHING = ["--do_train", "False", "--do_eval"]


def fails(run, message, *flags):
    with pytest.raises(InputError, match=message) as error:
        run("sft.py", *NOWHERE, *flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [each.value for each in OptimizerNames])
def test_every_optimizer_is_its_own_update_or_refused(run, name):
    known = name in SAME_AS_FUSED_ADAMW | OF_TORCH
    fails(run, "nowhere is not a folder" if known else f"--optim {name}: computes another update", "--optim", name)


REFUSED = {
    "--optim_args rank=4": "--optim_args rank=4: --optim adamw_torch takes none",
    "--optim_target_modules q_proj": "--optim_target_modules: belongs to GaLore",
    "--report_to wandb": "--report_to wandb: .*requires wandb.*pip install wandb",
    "--report_to papyrus": "--report_to papyrus: is none of",
    "--fp8": "--fp8: needs Gaudi's habana_frameworks",
    "--auto_find_batch_size": "--auto_find_batch_size: batches have few fixed shapes here; try --per_device",
    "--use_liger_kernel": "--use_liger_kernel has no effect here",
    "--lr_scheduler_type cosine_with_min_lr": "cosine_with_min_lr: --lr_scheduler_kwargs {}: .*min_lr",
    "--lr_scheduler_type warmup_stable_decay": "warmup_stable_decay: --lr_scheduler_kwargs {}: .*num_decay_steps",
    '--lr_scheduler_type cosine --lr_scheduler_kwargs {"wide":1}': "cosine: --lr_scheduler_kwargs {'wide': 1}: .*wide",
    '--lr_scheduler_type cosine --lr_scheduler_kwargs {"num_cycles":NaN}': "got .*; NaN is no number",
    '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":-1}': "'min_lr': -1}: its numb",
    '--lr_scheduler_type inverse_sqrt --lr_scheduler_kwargs {"timescale":9}': "{'timescale': 9}: it takes none",
    '--lr_scheduler_type polynomial --lr_scheduler_kwargs {"power":-1}': "polynomial: .*{'power': -1}: ",
    '--lr_scheduler_type cosine --lr_scheduler_kwargs {"last_epoch":3}': "cosine: .*last_epoch follows from",
    '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr_rate":7}': "rates below 0 or above",
    '--lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs {"num_decay_steps":9} --max_steps 8': "than the 8",
    '--lr_scheduler_kwargs {"num_cycles":1e400}': "--lr_scheduler_kwargs: got .*; 1e400 is no number",
    '--gradient_checkpointing_kwargs {"wide":1}': "--gradient_checkpointing_kwargs: wide 1 cannot be given here",
    '--gradient_checkpointing_kwargs {"use_reentrant":"no"}': "--gradient_checkpointing_kwargs: use_reentrant 'no' can",
    '--accelerator_config {"non_blocking":"maybe"}': "--accelerator_config: non_blocking is true or false",
    "--gaudi_config_name array": "--gaudi_config_name: got array; .*must be a mapping",
    "--gaudi_config_name word": "--gaudi_config_name: word sets use_fused_adam to 'false'; write true or false",
    "--gaudi_config_name slip": "--gaudi_config_name: slip sets use_fusd_adam, which has no effect",
    "--lr_scheduler_type reduce_lr_on_plateau": "reduce_lr_on_plateau requires an eval strategy",
    "--gaudi_config_name nothing": "--gaudi_config_name: got nothing; ",
    "--optim adamw_torc": "--optim: got adamw_torc; choose from adamw_torch,",
    "--run_name= --optim adamw_torc": "--optim: got adamw_torc; choose from adamw_torch,",
    "--run_name adamw_torc --optim adamw_torc": "--optim: got adamw_torc; choose from adamw_torch,",
    "--optim=": "--optim: got ''; choose from adamw_torch,",
    "--run_name wide --fsdp wide": "--fsdp: got wide; choose from full_shard",
    "--run_name none.json --accelerator_config none.json": "--accelerator_config: got none.json; No such file",
    "--accelerator_config=": "--accelerator_config: is empty",
    "--gaudi_config_name=": "--gaudi_config_name: is empty",
    "--tokenizer_name_or_path=": "--tokenizer_name_or_path: is empty; give a name, or leave it out",
    "--tpu_num_cores 8": "--tpu_num_cores: got 8; TPUs are not supported",
    "--push_to_hub_model_id mine": "--push_to_hub_model_id: got mine; Token is required",
    "--deepspeed -1": "--deepspeed: got -1; No such file",
    "--deepspeed list.json": "--deepspeed: got list.json; give an object of JSON, .* or a file of one",
    "--lr_scheduler_kwargs {": "--lr_scheduler_kwargs: got {; give an object of JSON",
    "--lr_scheduler_kwargs 3": "--lr_scheduler_kwargs: got 3; give an object of JSON",
    "--gradient_checkpointing_kwargs [1]": r"--gradient_checkpointing_kwargs: got \[1\]; give an object of JSON",
    '--deepspeed {"a"': '--deepspeed: got {"a"; give an object of JSON, .* or a file',
    '--deepspeed {"a":1}': '--deepspeed: got {"a":1}; Please specify the ZeRO optimization config',
    "--deepspeed none.json": "--deepspeed: got none.json; ",
    "--accelerator_config none.json": "--accelerator_config: got none.json; .*No such file",
    '--accelerator_config {"wide":1}': "--accelerator_config: got .*wide",
    '--accelerator_config {"split_batches":true}': "--accelerator_config: split_batches cannot be changed here: --per_",
    '--accelerator_config {"dispatch_batches":false}': "--accelerator_config: dispatch_batches cannot be changed here",
    '--accelerator_config {"even_batches":false}': "--accelerator_config: even_batches cannot be changed here",
    '--accelerator_config {"use_seedable_sampler":false}': "--accelerator_config: use_seedable_sampler cannot be",
    '--accelerator_config {"gradient_accumulation_kwargs":{"num_steps":2}}': "use --gradient_accumulation_steps",
    "--fsdp wide": "--fsdp: got wide; choose from full_shard",
    "--torch_compile_backend wide": "--torch_compile_backend: invalid choice: 'wide'",
    "--torch_compile_backend eager": "--torch_compile_backend: needs eager mode; set the variable",
    "--distribution_strategy wide": "--distribution_strategy: invalid choice: 'wide'",
    "--attn_implementation wide": "--attn_implementation: invalid choice: 'wide'",
    "--flash_attention_fast_softmax": "--flash_attention_fast_softmax works only with --attn_implementation",
    "--max_hpu_graphs 3": "--max_hpu_graphs",
    "--metric_for_best_model wide": "--metric_for_best_model: got wide; choose from loss",
    "--metric_for_best_model loss": "--metric_for_best_model: nothing is evaluated while training",
    "--save_strategy best --eval_strategy steps": "--save_strategy best: needs to know by what",
    "--gaudi_config_name plain --optim paged_adamw_32bit": "plain switches FusedAdamW off",
    "--gaudi_config_name cast": "cast sets use_torch_autocast, which is --bf16 here",
    "--gaudi_config_name lists": "lists sets lists of operations for autocast",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_run_is_one_line_before_anything_is_loaded(run, flags):
    write_gaudi_config("plain")
    write_gaudi_config("cast", use_torch_autocast=True)
    write_gaudi_config("word", use_fused_adam="false")
    write_gaudi_config("slip", use_fusd_adam=True)
    write_gaudi_config("array")
    Path("array/gaudi_config.json").write_text("[1]")
    write_gaudi_config("lists", autocast_bf16_ops=["mul"], autocast_fp32_ops=["add"])
    Path("list.json").write_text("[1]")
    fails(run, REFUSED[flags], *flags.split())


POLYNOMIAL = ["--lr_scheduler_type", "polynomial", "--warmup_steps", 100]


def test_a_schedule_is_tried_with_the_steps_that_it_will_have(run):
    for flags in ([], ["--max_steps", 50], ["--max_steps", 1_000_000]):
        fails(run, "nowhere is not a folder", *POLYNOMIAL, *flags)
    fails(run, "--lr_scheduler_type polynomial: .*division by zero", *POLYNOMIAL, "--max_steps", 100)


def write_gaudi_config(folder, **values):
    Path(folder).mkdir()
    (Path(folder) / "gaudi_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("values", [{}, {"use_fused_adam": True}])
def test_a_gaudi_config_decides_which_kernel_steps(run, values, tmp_path, monkeypatch):
    from align.training.supervised import SupervisedTrainer

    made = []
    create = SupervisedTrainer.create_optimizer
    monkeypatch.setattr(
        SupervisedTrainer, "create_optimizer", lambda self: made.append(type(create(self)).__name__) or self.optimizer
    )
    write_gaudi_config("config", **values)
    write_rows("rows.jsonl", [{"question": "Who?", "answer": "Me."}] * 8)
    model = ["--model_name_or_path", save_model(tmp_path / "model")]

    run("sft.py", *NOWHERE, *model, "--gaudi_config_name", "config", "--max_steps", 1, "--optim", "adamw_torch")

    assert set(made) == {"FusedAdamW" if values else "AdamW"}


BATCHES = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"), "auto")
BATCHES |= {"zero_optimization": {"stage": 2}}
# What a DeepSpeed file says beside that, and what is said of it
AGAINST_THE_FLAGS = {
    "off": ({"bf16": {"enabled": False}}, "--bf16 is on, but bf16.enabled is false there; set it to"),
    "half": ({"fp16": {"enabled": True}}, "fp16.enabled is true there, but Gaudi computes in bfloat16"),
    "nothing is shared": ({"zero_optimization": {}}, "zero_optimization.stage is 0 there, which shares nothing among"),
    "sums": (
        {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
        "data_types.grad_accum_dtype goes with zero_optimization.stage 2 or 3 here",
    ),
    "no bucket": (
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}},
        "zero_optimization.reduce_bucket_size is 0 there, which holds no gradient",
    ),
    "clipping": ({"gradient_clipping": 9}, "gradient_clipping is 9 there, but 1.0 by --max_grad_norm; set it to"),
    "batch": ({"train_batch_size": 7, "bf16": {"enabled": "auto"}}, "train_batch_size is 7 there, but 8 by cards x "),
    "sgd": (
        {"bf16": {"enabled": True}, "optimizer": {"type": "SGD"}},
        "ZeRO refuses the optimizer SGD; name one of adagrad, adam,",
    ),
}


AUTO = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
MALFORMED = {
    "section": ({"zero_optimization": [2]}, "--deepspeed: got ds.json; zero_optimization there is no object"),
    "inner section": ({"optimizer": {"params": []}}, "--deepspeed: got ds.json; optimizer.params there is no object"),
    "nan": ({"gradient_clipping": float("nan")}, "--deepspeed: got ds.json; NaN is no number"),
    "too large": ({"gradient_clipping": float("inf")}, "--deepspeed: got ds.json; Infinity is no number"),
    "stage": ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage is 2 there, which shares nothing"),
    "word": ({"bf16": {"enabled": "yes"}}, "--bf16 is on, but bf16.enabled is yes there"),
    "no word": ({"bf16": {}}, "--bf16 is on, but bf16.enabled is missing there"),
    "key": ({"zero_optimization": {"stage": 2, "stag": 1}}, "DeepSpeed cannot read it: stag: Extra inputs are not"),
    "device": ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "x"}}}, "offload_optimizer.device: "),
    "no rate": ({"optimizer": {"type": "AdamW"}}, "optimizer.params lacks lr, betas, eps, weight_decay, so no flag"),
    "setting": (
        {"optimizer": {"type": "AdamW", "params": {**AUTO, "x": 1}}},
        "optimizer.params.x is nothing that AdamW",
    ),
    "schedule": ({"scheduler": {"type": "Slow"}}, "DeepSpeed has no scheduler Slow"),
    "no peak": ({"scheduler": {"type": "WarmupLR"}}, "scheduler.params lacks warmup_max_lr, warmup_num_steps, so no"),
    "its settings": ({"scheduler": {"type": "OneCycle", "params": {"x": 1}}}, "scheduler.params {'x': 1}: .*x"),
    "log": ({"wandb": {"enabled": True}}, "wandb.enabled is true there; give --report_to"),
    "curriculum": ({"curriculum_learning": {"enabled": True}}, "curriculum_learning.enabled is true there"),
}


@pytest.mark.parametrize("name", AGAINST_THE_FLAGS)
@pytest.mark.parametrize("script", ["sft.py", "dpo.py"])
def test_a_deepspeed_file_that_contradicts_the_flags_is_one_line_before_anything_is_loaded(run, script, name):
    config, message = AGAINST_THE_FLAGS[name]
    Path("ds.json").write_text(json.dumps(BATCHES | config))
    flags = [*NOWHERE, "--deepspeed", "ds.json", "--bf16", "--per_device_train_batch_size", 8]
    with pytest.raises(InputError) as error:
        run(script, *flags, "--gradient_accumulation_steps", 1)
    assert str(error.value).startswith(f"--deepspeed ds.json: {message}")


@pytest.mark.parametrize("name", MALFORMED)
def test_what_deepspeed_could_not_read_or_would_take_its_own_value_for_is_one_line_before_anything_is_loaded(run, name):
    config, message = MALFORMED[name]
    Path("ds.json").write_text(json.dumps(BATCHES | {"bf16": {"enabled": True}} | config))
    fails(run, message, "--deepspeed", "ds.json", "--bf16")


def test_zero_2_without_training_is_one_line(run):
    Path("ds.json").write_text(json.dumps(BATCHES))
    fails(run, "ds.json: zero_optimization.stage 2 shares what training", "--deepspeed", "ds.json", *NOTHING)


def test_a_deepspeed_file_without_the_launcher_is_one_line(run, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mpi4py" else find(name))
    Path("ds.json").write_text(json.dumps(BATCHES))
    fails(run, "--deepspeed ds.json: start the script with gaudi_spawn.py --use_deepspeed", "--deepspeed", "ds.json")


def test_what_a_deepspeed_file_decides_in_place_of_the_flags_is_told(run, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    config = BATCHES | {"bf16": {"enabled": True}, "optimizer": {"type": "AdamW", "params": AUTO}}
    config |= {"gradient_cliping": 1.0}
    Path("ds.json").write_text(json.dumps(config))
    fails(run, "nowhere is n", "--deepspeed", "ds.json")
    said = capsys.readouterr().err
    assert "--deepspeed ds.json: its optimizer AdamW takes the place of --optim adamw_torch" in said
    assert "ds.json: gradient_cliping has no effect" in said
    assert "ds.json: bf16.enabled is true there, so the run computes in bfloat16 without --bf16" in said

    Path("ds.json").write_text(json.dumps(BATCHES | {"bf16": {"enabled": "auto"}}))
    fails(run, "nowhere is n", "--deepspeed", "ds.json")
    assert "bf16" not in capsys.readouterr().err
