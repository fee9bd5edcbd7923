"""What was left on the host is refused where a card refuses it. Run: pytest tests/test_emulator_placement.py"""

import inspect
import linecache
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_rows
from tiny import save_model

from habana_frameworks.torch.hpex.kernels import FusedSDPA
from habana_frameworks.torch.hpex.optimizers import FusedAdamW

SFT = "sft.py --max_seq_length 64 --do_train --do_eval --max_steps 1".split()
DPO = "dpo.py --max_prompt_length 48 --max_length 96 --do_train --do_eval --max_steps 1 --eval_steps 1".split()


def plant(monkeypatch, owner, method, right, wrong):
    """Puts a copy of the method, with one place of it changed, where the method was."""
    source = textwrap.dedent(inspect.getsource(getattr(owner, method)))
    assert right in source
    body = textwrap.indent(source.replace(right, wrong), "    ")
    # A function that holds `__class__` lets the method's super() find its class.
    text = f"def make(__class__):\n{body}\n    return {method}\n"
    linecache.cache["planted.py"] = (len(text), None, text.splitlines(keepends=True), "planted.py")
    module, made = sys.modules[owner.__module__] if inspect.isclass(owner) else owner, {}
    exec(compile(text, "planted.py", "exec"), vars(module), made)
    monkeypatch.setattr(owner, method, made["make"](owner))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    made = [{"question": f"what is {i}?", "response_j": f"It is {i}. " * 3, "response_k": "No."} for i in range(24)]
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", made)


# Script and flags; what is changed, from what to what; and the file whose line must be named.
MISTAKES = {
    "a mask built on the host": (
        SFT,
        ("rows.RowsMixin", "_prepare_inputs"),
        (
            'inputs.pop("segment_ids"), inputs["position_ids"], ',
            'inputs.pop("segment_ids").cpu(), inputs["position_ids"].cpu(), ',
        ),
        "modeling_llama.py",
    ),
    "sums of an evaluation on the host": (
        SFT,
        ("supervised.SupervisedTrainer", "evaluation_loop"),
        ("torch.zeros(2, device=self.args.device)", "torch.zeros(2)"),
        "supervised.py",
    ),
    "a count made on the host": (
        SFT,
        ("supervised.SupervisedTrainer", "prediction_step"),
        (".sum().to(result[0].device)", ".cpu().sum(-1)"),
        "planted.py:5",
    ),
    "columns that name no device": (
        [*SFT, "--skip_probe"],
        ("attention", "find_visible"),
        ("torch.arange(segment_ids.shape[1], device=segment_ids.device)", "torch.arange(segment_ids.shape[1])"),
        "planted.py",
    ),
    "a buffer that names no device": (
        DPO,
        ("preference", "sum_by_slot"),
        ("values.new_zeros(", "torch.zeros("),
        "planted.py:5",
    ),
    "targets left on the host": (
        DPO,
        ("preference.PreferenceTrainer", "_score"),
        ('targets, slots, pairs = inputs["targets"]', 'targets, slots, pairs = inputs["targets"].cpu()'),
        "head.py",
    ),
    "lengths left on the host": (
        DPO,
        ("preference.PreferenceTrainer", "_total"),
        ('reference, inputs["answer_lengths"])', 'reference, inputs["answer_lengths"].cpu())'),
        "preference.py",
    ),
    "results that were not fetched": (
        [*DPO, "--precompute_ref_log_probs", "--max_train_samples", "6"],
        ("preference.PreferenceTrainer", "_compute_reference"),
        ("self._score_reference(inputs).float().cpu()", "self._score_reference(inputs).float()"),
        "planted.py",
    ),
    "an array of the card's memory": (
        [*DPO, "--precompute_ref_log_probs", "--max_train_samples", "5"],
        ("preference.PreferenceTrainer", "_compute_reference"),
        ('"sum").cpu().numpy()', '"sum").numpy()'),
        "Use Tensor.cpu() to copy the tensor to host memory first",
    ),
    "prompts that were not moved": (
        [*DPO, "--sample_prompts", "1"],
        ("samples.Samples", "_generate"),
        ("torch.from_numpy(ids).to(args.device)", "torch.from_numpy(ids)"),
        "head.py",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_refused_and_its_line_named(run, monkeypatch, model, rows, mistake):
    from align.models import attention
    from align.training import preference, samples, supervised
    from align.training import rows as of_both

    command, (owner, method), change, place = MISTAKES[mistake]
    module, _, name = owner.partition(".")
    modules = {each.__name__.split(".")[-1]: each for each in (attention, of_both, preference, samples, supervised)}
    module = modules[module]
    plant(monkeypatch, getattr(module, name) if name else module, method, *change)

    with pytest.raises((RuntimeError, TypeError)) as caught:
        run(*command, "--model_name_or_path", model, "--dataset_name", rows, "--output_dir", "out")

    assert place in str(caught.value)


def test_a_copy_on_the_host_stays_as_it_was_while_the_card_goes_on():
    weight = torch.nn.Parameter(torch.ones(3, device="hpu"))
    before, view = weight.detach().cpu(), weight.detach()[:2]

    with torch.no_grad():
        weight.mul_(2)

    assert before.device.type == "cpu"
    assert (weight.cpu() - before).tolist() == [1, 1, 1]
    assert view.device.type == "hpu"
    assert view.tolist() == [2, 2]


def test_a_gradient_finds_its_way_back_to_where_its_weight_is():
    on_host, on_card = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, device="hpu"))

    ((on_host.to("hpu") * on_card).cpu() * on_host).sum().backward()

    assert [on_host.grad.device.type, on_card.grad.device.type] == ["cpu", "hpu"]
    assert [on_host.grad.tolist(), on_card.grad.tolist()] == [[2, 2], [1, 1]]


def optimize_with_state_on_the_host(optimizer_type, card):
    weight = torch.nn.Parameter(card)
    optimizer = optimizer_type([weight])
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        optimizer.state[weight]["exp_avg"] = optimizer.state[weight]["exp_avg"].cpu()


@pytest.mark.parametrize(
    "mix",
    [
        lambda card, host: card + host,
        lambda card, host: host.add_(card),
        lambda card, host: torch.cat([card, host]),
        lambda card, host: torch.nn.functional.embedding(host.long(), card[:, None]),
        lambda card, host: torch.nn.Linear(2, 2)(card),
        lambda card, host: torch.add(card, card, out=host),
        lambda card, host: host.sum().add_(card.sum()),
        lambda card, host: FusedSDPA.apply(card[None, None, None], card[None, None, None], host[None, None, None]),
        torch.equal,
        lambda card, host: (card.requires_grad_() * 2).backward(host),
        lambda card, host: setattr(card, "grad", host),
        lambda card, host: torch.autograd.grad(card.requires_grad_() * 2, card, host),
        lambda card, host: optimize_with_state_on_the_host(FusedAdamW, card),
        lambda card, host: optimize_with_state_on_the_host(torch.optim.AdamW, card),
    ],
)
def test_operations_do_not_mix_card_and_host(mix):
    with pytest.raises(RuntimeError, match=f"{Path(__file__).name}:[0-9]+"):
        mix(torch.ones(2, device="hpu"), torch.ones(2))


@pytest.mark.parametrize(
    "mix",
    [
        lambda card, host: card * host.sum(),  # a number is taken along
        lambda card, host: card.copy_(host),
        lambda card, host: card[torch.tensor([0, 1])],
        lambda card, host: torch.where(card > 0, card, torch.tensor(2.0)),
        lambda card, host: torch.nn.functional.one_hot(card.long()),  # makes a tensor within
        lambda card, host: torch.optim.AdamW([torch.nn.Parameter(card)]).step(),
        lambda card, host: torch.nn.utils.clip_grad_norm_([torch.nn.Parameter(card)], 1.0),
        lambda card, host: card.to(host).add(host),
        lambda card, host: torch._foreach_addcmul([card, card], [card, card], [card, card], host),  # numbers, packed
    ],
)
def test_operations_that_a_card_takes_are_taken(mix):
    mix(torch.ones(2, device="hpu"), torch.ones(2))


@pytest.mark.parametrize("convert", [np.asarray, np.array, np.from_dlpack, lambda card: np.array([card, card])])
def test_no_library_reads_the_cards_memory(convert):
    with pytest.raises((TypeError, BufferError), match="hpu"):
        convert(torch.ones(2, device="hpu"))


def test_what_is_pinned_is_a_copy_on_the_host():
    batch = torch.ones(2)
    (loaded,) = torch.utils.data.DataLoader([batch], batch_size=None, pin_memory=True)
    pinned = batch.pin_memory()
    batch.zero_()

    assert pinned.tolist() == [1, 1]
    assert [each.is_pinned() for each in (batch, pinned, loaded)] == [False, True, True]
    assert pinned.pin_memory() is pinned


def test_a_tensor_can_be_made_pinned_on_the_host_alone():
    assert torch.empty(2, pin_memory=True).is_pinned()
    with pytest.raises(RuntimeError, match="only dense CPU tensors can be pinned"):
        torch.empty(2, pin_memory=True, device="hpu")


def test_a_loader_does_not_pin_a_batch_that_is_on_the_card():
    loader = torch.utils.data.DataLoader([1], collate_fn=lambda row: torch.tensor(row).hpu(), pin_memory=True)

    with pytest.raises(RuntimeError, match=rf"only dense CPU tensors can be pinned .*{Path(__file__).name}:[0-9]+"):
        next(iter(loader))


def test_what_the_card_draws_is_no_number_of_the_hosts():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    drawn = torch.nn.functional.dropout(torch.ones(100, device="hpu")), torch.rand(4, device="hpu")

    assert torch.equal(torch.rand(4), expected)
    torch.manual_seed(3)
    assert torch.equal(torch.nn.functional.dropout(torch.ones(100, device="hpu")).cpu(), drawn[0].cpu())


def test_strict_devices_can_be_turned_off():
    code = "import torch; print((torch.ones(2, device='hpu') + torch.ones(2)).device, torch.ones(1).device)"

    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HABANA_EMULATOR_STRICT": "0"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert result.stdout.split() == ["hpu:0", "hpu:0"]
