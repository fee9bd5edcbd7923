"""Preference losses on shared rows against plain trl and transformers. Run: pytest tests/test_preference.py"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from family_models import save_family_model
from optimum.habana.transformers.modeling_utils import adapt_transformers_to_gaudi
from optimum.habana.trl import GaudiDPOConfig
from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.data.packing import NONE
from align.training import pairs, preference
from align.training.reference import Stored
from align.upstream_fixes import gaudi_config

FAMILIES = ("llama", "mistral", "mixtral", "qwen2")
LOSSES = {
    "sigmoid": {},
    "smoothed": {"label_smoothing": 0.1},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "exo": {"loss_type": "exo_pair", "label_smoothing": 0.1},
    "hinge": {"loss_type": "hinge", "beta": 0.5},
    "ipo": {"loss_type": "ipo"},
    "sppo": {"loss_type": "sppo_hard"},
    "nca": {"loss_type": "nca_pair"},
    "rpo": {"rpo_alpha": 1.0},  # trl 0.9.6 multiplies the other term by it
    "js": {"f_divergence_type": "js_divergence"},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
}


def lora(init_lora_weights=False):
    return LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=init_lora_weights
    )


def make_pairs(number: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    lengths = [(rng.randint(1, 20), rng.randint(1, 12), rng.randint(1, 12)) for _ in range(number)]
    names = ("prompt_input_ids", "chosen_input_ids", "rejected_input_ids")
    pairs = [
        {name: [rng.randrange(4, 500) for _ in range(n)] for name, n in zip(names, each, strict=True)}
        for each in lengths
    ]
    return [
        {**pair, **{f"{side}_labels": pair[f"{side}_input_ids"] for side in ("chosen", "rejected")}} for pair in pairs
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of each family, with a random adapter."""
    adapt_transformers_to_gaudi()  # before transformers gives away, and remembers, classes of its own
    made = {}
    for family in FAMILIES:
        made[family] = save_model(tmp_path_factory.mktemp(family), family)
        torch.manual_seed(1)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(made[family]), lora())
        model.save_pretrained(made[family] / "adapter")
    return made


@pytest.fixture(scope="module")
def plain(folders, tmp_path_factory):
    """Loss, metrics and gradients of 8 pairs from plain trl: by family for the sigmoid loss, by loss for Llama."""
    cases = {family: (family, {}) for family in FAMILIES} | {name: ("llama", flags) for name, flags in LOSSES.items()}
    folder = tmp_path_factory.mktemp("plain")
    described = [
        {"name": name, "model": str(folders[family]), "config": flags, "pairs": make_pairs(8)}
        for name, (family, flags) in cases.items()
    ]
    (folder / "cases.json").write_text(json.dumps(described))
    script = [sys.executable, Path(__file__).parent / "plain_trl.py", folder]
    subprocess.run(script, check=True, env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    return {name: load_file(folder / f"{name}.safetensors") for name in cases}


@pytest.fixture
def make_trainer(folders, tmp_path):
    def make_trainer(family="llama", number=8, shared=True, batch=8, adapter=True, stored=None, **flags):
        flags = {"max_length": 40, "max_prompt_length": 20, "num_train_epochs": 1, **flags}
        args = GaudiDPOConfig(
            str(tmp_path),
            use_habana=True,
            use_lazy_mode=True,
            report_to="none",
            per_device_train_batch_size=batch,
            **flags,
        )
        model = AutoModelForCausalLM.from_pretrained(folders[family], attn_implementation="eager")
        rows = Dataset.from_list(make_pairs(number))
        lengths = {"train": pairs.measure(rows)}
        if shared:
            per_device = batch * args.gradient_accumulation_steps
            budget = preference.token_budget(args, batch)
            layout = pairs.share_rows(lengths, per_device, budget, 4, pairs.column_cost(model.config))
        else:
            layout = pairs.separate_rows(lengths, 1, args.max_length)
        trainer = preference.PreferenceTrainer(
            model=model,
            ref_model=None,
            args=preference.fit_batches(args, layout),
            gaudi_config=gaudi_config(args),
            layout=layout,
            pairs={"train": pairs.PairDataset(rows, layout.rows["train"], stored)},
            tokenizer=AutoTokenizer.from_pretrained(folders[family]),
            peft_config=lora(init_lora_weights=True),
        )
        if adapter:
            set_peft_model_state_dict(trainer.model, load_peft_weights(folders[family] / "adapter"))
        return trainer

    return make_trainer


def compute_step(trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first step, without the update."""
    if trainer.args.use_hpu_graphs_for_training:
        trainer._wrap_model(trainer.model)
    loader = iter(trainer.get_train_dataloader())
    steps = trainer.args.gradient_accumulation_steps
    batches, counts = trainer.get_batch_samples_transformers(loader, steps, trainer.args.device)
    loss = sum(trainer.training_step(trainer.model, batch, counts) for batch in batches)
    return loss.item(), {name: each.grad for name, each in trainer.model.named_parameters() if each.grad is not None}


def assert_equal(trainer, expected):
    loss, gradients = compute_step(trainer)
    assert loss == pytest.approx(expected["loss"].item(), rel=1e-6, abs=1e-5)
    metrics = trainer.average("train")
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected"):
        assert metrics[name] == pytest.approx(expected[name].item(), rel=1e-5, abs=1e-5)
    for name, gradient in gradients.items():
        plain_name = name.replace("base_model.model.base_model", "base_model")
        torch.testing.assert_close(gradient.cpu(), expected[plain_name], atol=1e-5, rtol=1e-4)
    assert len(gradients) == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_rows_equal_plain_trl(family, make_trainer, plain):
    trainer = make_trainer(family)

    assert trainer.pairs_per_row > 1
    assert_equal(trainer, plain[family])


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_equals_plain_trl(loss, make_trainer, plain):
    assert_equal(make_trainer(**LOSSES[loss]), plain[loss])


@pytest.mark.parametrize("batch", [8, 4, 2, 1])
def test_loss_and_gradient_do_not_depend_on_how_a_step_is_cut(batch, make_trainer, plain):
    assert_equal(make_trainer(batch=batch, gradient_accumulation_steps=8 // batch), plain["llama"])


GRAPHS = {"use_hpu_graphs_for_training": True}


@pytest.mark.parametrize(
    "flags", [{"gradient_checkpointing": True}, GRAPHS, GRAPHS | {"batch": 2, "gradient_accumulation_steps": 4}]
)
def test_gradients_are_exact_with_what_saves_memory_or_time(flags, make_trainer, plain):
    assert_equal(make_trainer(**flags), plain["llama"])


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_rows_for_models_that_cannot_share_them_equal_plain_trl(family, make_trainer, plain):
    assert_equal(make_trainer(family, shared=False), plain[family])


def test_places_without_a_pair_change_nothing(make_trainer):
    full, wide = make_trainer(number=6, batch=6), make_trainer(number=6, batch=8)

    expected, gradients = compute_step(full)
    loss, same = compute_step(wide)

    assert loss == pytest.approx(expected, abs=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, atol=1e-6, rtol=1e-4)


def test_the_first_loss_is_ln_2_at_any_accumulation(make_trainer):
    for steps in (1, 2, 4):
        loss, _ = compute_step(make_trainer(adapter=False, batch=2, gradient_accumulation_steps=steps))

        assert loss == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize("whole_logits", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_under_bf16_the_first_loss_is_ln_2_too(family, whole_logits, make_trainer):
    trainer = make_trainer(family, adapter=False, bf16=True)
    if whole_logits:
        trainer.heads = {"policy": None}
    loss, _ = compute_step(trainer)

    assert loss == pytest.approx(np.log(2), abs=1e-6)
    assert {total.dtype for total in trainer.totals["train"].values()} == {torch.float32, torch.int64}


def test_stored_log_probs_give_the_same_step_with_one_pass_less(make_trainer, plain, tmp_path, monkeypatch):
    stored = Stored(tmp_path / "key.safetensors", None)
    trainer = make_trainer(stored=stored)
    trainer.store_reference()
    monkeypatch.setattr(trainer.model, "disable_adapter", None)  # the reference can not be asked any more

    assert_equal(trainer, plain["llama"])


def test_no_logits_are_kept_for_the_gradient(make_trainer):
    trainer = make_trainer(batch=8)
    batch = next(iter(trainer.get_train_dataloader()))
    kept = []

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch), num_items_in_batch=torch.ones(2))

    vocabulary = trainer.model.config.vocab_size
    assert len(kept) > 10
    assert [tensor.shape for tensor in kept if vocabulary in tensor.shape[1:]] == []


def test_each_epoch_learns_every_pair_in_an_order_of_its_own(make_trainer):
    loader, orders = make_trainer(number=16, batch=2).get_train_dataloader(), []
    for epoch in range(2):
        loader.set_epoch(epoch)  # as the trainer does
        orders.append([index for batch in loader for index in batch["indices"].tolist() if index != NONE])

    assert sorted(orders[0]) == sorted(orders[1]) == list(range(16))
    assert orders[0] != orders[1]


DROPPING = {
    "opt": {"dropout": 0.5, "attention_dropout": 0.5},
    "llama": {"attention_dropout": 0.5},
    "gpt_neox": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
    "falcon": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
    "minimax": {"router_jitter_noise": 0.5},
    "phimoe": {"input_jitter_noise": 0.5},
}


@pytest.mark.parametrize("row", DROPPING)
def test_dropout_that_is_left_out_is_left_out_of_functions_too(row, tmp_path):
    adapt_transformers_to_gaudi()
    folder = save_family_model(tmp_path / "model", row, **DROPPING[row])
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").train()
    ids = torch.arange(4, 24)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert not torch.equal(*(model(**inputs).logits for _ in range(2)))

    said = preference.leave_out_dropout(model)

    assert torch.equal(*(model(**inputs).logits for _ in range(2)))
    with preference.saying_their_dropout(said):
        assert {name: getattr(model.config, name) for name in DROPPING[row]} == DROPPING[row]
    assert torch.equal(*(model(**inputs).logits for _ in range(2)))


def test_evaluation_averages_over_pairs_wherever_they_fell(make_trainer):
    trainer = make_trainer(number=7, batch=4)
    losses = []
    for rows_at_once in (1, 2, 3):
        trainer.args.per_device_eval_batch_size = rows_at_once * trainer.pairs_per_row
        losses.append(trainer.evaluate(trainer.train_dataset)["eval_loss"])

    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


def test_the_reference_has_neither_the_dropout_nor_the_noise_of_the_policy_that_it_shares_its_weights_with(
    make_trainer,
):
    trainer = make_trainer(disable_dropout=False, neftune_noise_alpha=50.0)
    for module in trainer.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    said = {name.removeprefix("eval_"): value for name, value in trainer.evaluate(trainer.train_dataset).items()}
    trainer._activate_neftune(trainer.model)
    compute_step(trainer)
    said_in_training = trainer.average("train")

    def reference(figures, answer):
        return figures[f"logps/{answer}"] - figures[f"rewards/{answer}"] / trainer.beta

    for answer in ("chosen", "rejected"):
        assert reference(said_in_training, answer) == pytest.approx(reference(said, answer), abs=1e-3)
        assert abs(said_in_training[f"logps/{answer}"] - said[f"logps/{answer}"]) > 0.01
    assert trainer.model.training
