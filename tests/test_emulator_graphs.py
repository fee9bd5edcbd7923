"""HPU graphs have static buffers, as on a card. Run: pytest tests/test_emulator_graphs.py"""

from collections import UserDict

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from habana_frameworks.emulator.graph_counter import count_graphs
from habana_frameworks.torch.hpu import HPUGraph, ModuleCacher, wrap_in_hpu_graph, wrap_in_hpu_graph_func

HPU = torch.device("hpu")


def card(value, *shape):
    return torch.full(shape or (2,), float(value), device=HPU)


class Module(torch.nn.Module):
    """Computes `function`, counting its calls."""

    def __init__(self, function):
        super().__init__()
        self.function, self.calls = function, 0

    def forward(self, x, **options):
        self.calls += 1
        return self.function(x, **options)


def test_a_graph_replays_on_new_content_of_its_inputs():
    inputs, total = card(1), card(0)
    graph = HPUGraph()
    with torch.hpu.graph(graph):
        assert torch.hpu.is_current_stream_capturing()
        doubled = inputs * 2
        total.add_(doubled.view(2))

    inputs.fill_(5)
    graph.replay()

    assert doubled.tolist() == [10, 10]
    assert total.tolist() == [12, 12]
    assert not torch.hpu.is_current_stream_capturing()


def test_a_replay_overwrites_the_first_calls_inputs_and_outputs():
    module = wrap_in_hpu_graph(Module(lambda x: {"doubled": x * 2, "sum": [x.sum()]}))
    first = card(1)

    outputs = module(first)
    again = module(card(5))

    assert again is outputs
    assert outputs["doubled"].tolist() == [10, 10]
    assert outputs["sum"][0].item() == 10
    assert first.tolist() == [5, 5]
    assert module.calls == 1


def test_without_a_tensor_cache_a_replay_reads_the_callers_tensors():
    module = wrap_in_hpu_graph(Module(lambda x: x.add_(1) * 2), disable_tensor_cache=True)
    first, second = card(1), card(5)

    outputs = module(first)
    again = module(second)

    assert again is outputs
    assert (first.tolist(), second.tolist(), outputs.tolist()) == ([2, 2], [6, 6], [12, 12])


HOST_READS = {
    "x * x.sum().item()": [6, 6],
    "x * x.cpu().sum()": [6, 6],
    "x * x.tolist()[0]": [3, 3],
    "x if x[0] < 2 else -x": [3, 3],
    "x + len((x - 1).nonzero())": [3, 3],
}


@pytest.mark.parametrize("code", HOST_READS)
def test_what_the_host_reads_is_that_of_the_first_call_and_warned_of_by_line(code):
    module = wrap_in_hpu_graph(Module(eval(f"lambda x: {code}")))
    with pytest.warns(UserWarning, match=r"reads from the card while an HPU graph is recorded") as warned:
        module(card(1))

    assert module(card(3)).tolist() == HOST_READS[code]
    assert str(warned[0].message).startswith(("<string>:1", f"{__file__}:"))


def test_an_input_on_the_host_is_baked_in_and_warned_of_by_line():
    module = wrap_in_hpu_graph(Module(lambda x: x.to(HPU) * 2))
    with pytest.warns(UserWarning, match=rf"{__file__}:\d+ gives an HPU graph a tensor of the host, of shape \[2\]"):
        module(torch.ones(2))

    assert module(torch.full((2,), 3.0)).tolist() == [2, 2]


def test_state_and_tensors_that_python_made_are_baked_in():
    module = Module(lambda x: x + torch.tensor([float(module.calls)]).to("hpu") + module.calls)
    wrap_in_hpu_graph(module)

    first = module(card(1)).tolist()

    assert module(card(1)).tolist() == first == [3, 3]
    assert module.calls == 1
    module.clear_cache()
    assert module(card(1)).tolist() == [5, 5]


def test_tensors_that_a_module_keeps_are_written_by_replays():
    module = Module(lambda x: setattr(module, "kept", x * 3) or module.buffer.copy_(x).detach())
    module.buffer = card(0)
    wrap_in_hpu_graph(module)

    module(card(1))
    kept = module.kept
    module(card(2))

    assert kept.tolist() == [6, 6]
    assert module.buffer.tolist() == [2, 2]


def test_random_numbers_are_drawn_anew():
    module = wrap_in_hpu_graph(Module(lambda x: functional.dropout(x, 0.5)))

    first = module(card(1, 64)).clone()

    assert not torch.equal(module(card(1, 64)), first)


def test_the_key_is_shapes_and_values_but_no_dtypes_and_no_modes():
    module = wrap_in_hpu_graph(Module(lambda x, scale=1: x * scale).train())

    with torch.no_grad():
        module(card(1))
        module.eval()
        assert module(card(2).to(torch.bfloat16)).dtype == torch.float32
    assert module.calls == 1
    assert module(card(2), scale=3).tolist() == [6, 6]
    assert module(card(2, 3)).shape == (3,)
    assert module.calls == 3


def test_the_key_is_a_hash_with_what_python_confuses_and_containers_keep_their_types():
    module = wrap_in_hpu_graph(Module(lambda x, scale=1: x[0] * scale))

    assert module([card(1)], scale=-1).tolist() == [-1, -1]
    assert module([card(1)], scale=-2).tolist() == [-1, -1]  # Python's hash of -1 is -2
    with torch.autocast("hpu", torch.bfloat16):
        assert module([card(1)], scale=-2).dtype == torch.bfloat16
    with pytest.raises(AssertionError, match="recorded with list, not tuple"):
        module((card(1),), scale=-1)


def test_a_batch_that_is_no_dict_is_recorded_anew_in_every_call():
    module = wrap_in_hpu_graph(Module(lambda batch: batch["x"] * 2))

    made = [module(UserDict(x=card(value))).tolist() for value in (1, 2)]

    assert made == [[2, 2], [4, 4]]
    assert module.calls == 2


def test_a_graph_is_recorded_on_a_stream_of_its_own():
    with torch.hpu.graph(HPUGraph()):
        within = torch.hpu.current_stream()

    assert within != torch.hpu.current_stream() == torch.hpu.default_stream()


def test_callables_are_warmed_up_before_they_are_recorded():
    module = Module(lambda x: functional.linear(x, module.weight))
    module.weight = torch.nn.Parameter(card(1, 2, 4))

    torch.hpu.make_graphed_callables(module, (card(1, 3, 4),), warmups=2)

    assert module.calls == 3
    assert module.weight.grad is None


def test_a_wrapped_module_counts_one_graph_a_shape_up_to_its_limit():
    model = wrap_in_hpu_graph(torch.nn.Linear(4, 2).to(HPU), max_graphs=2)

    with count_graphs() as graphs, torch.no_grad():
        for length in (1, 2, 1, 2, 3):
            model(card(1, length, 4))
        model(card(1, 1, 4), bypass_hpu_graphs=True)

    assert sorted(graphs.hpu.values()) == [2, 2]


def test_warmup_mode_gives_back_what_was_there():
    module = wrap_in_hpu_graph(Module(lambda x: x * 2), asynchronous=True, dry_run=True)

    module(card(1))

    assert module(card(7), warmup_mode=True).tolist() == [2, 2]


def test_a_dry_run_uses_up_no_random_number():
    plain, wrapped = (Module(lambda x: functional.dropout(x, 0.5)).train() for _ in range(2))
    ModuleCacher()(wrapped, dry_run=True, allow_unused_input=True)

    torch.hpu.manual_seed(0)
    expected = [plain(card(1, 64).requires_grad_()) for _ in range(3)]
    torch.hpu.manual_seed(0)

    assert all(torch.equal(wrapped(card(1, 64).requires_grad_()), each) for each in expected)


def gradient_of(module, *values):
    module.zero_grad()
    for value in values:
        module(card(value, 3, 4)).sum().backward()
    return module.weight.grad[0, 0].item()


def test_a_training_graph_gives_the_gradients_of_the_plain_model():
    plain = torch.nn.Linear(4, 2).to(HPU)
    wrapped = ModuleCacher()(plain)

    assert wrapped is plain
    assert [gradient_of(plain, value) for value in (1, 2, 3)] == [3, 6, 9]
    with count_graphs() as graphs:
        plain.eval()
        assert torch.equal(plain(card(1, 3, 4)), functional.linear(card(1, 3, 4), plain.weight, plain.bias))
    assert not graphs.hpu


@pytest.mark.parametrize(("reads_in_place", "expected"), [(True, [3, 6]), (False, [6, 6])])
def test_without_a_tensor_cache_each_backward_pass_reads_its_own_inputs(reads_in_place, expected):
    module = ModuleCacher()(torch.nn.Linear(4, 2).to(HPU), disable_tensor_cache=reads_in_place)
    inputs = [card(value, 3, 4) for value in (1, 2)]

    losses = [module(each).sum() for each in inputs]
    gradients = [torch.autograd.grad(loss, module.weight)[0][0, 0].item() for loss in losses]

    assert gradients == expected
    assert inputs[0].tolist() == card(1 if reads_in_place else 2, 3, 4).tolist()


def test_gradients_of_an_accumulation_need_a_graph_for_its_first_pass():
    """The first pass's gradients are the graph's own memory, which the next replay of that graph overwrites."""
    told, untold = torch.nn.Linear(4, 2).to(HPU), torch.nn.Linear(4, 2).to(HPU)
    ModuleCacher()(told, have_grad_accumulation=True)
    ModuleCacher()(untold)

    told.zero_grad()
    for place, value in enumerate((1, 2, 4)):
        told.set_iteration_count(place)
        told(card(value, 3, 4)).sum().backward()

    assert told.weight.grad[0, 0].item() == 3 * (1 + 2 + 4)
    assert gradient_of(untold, 1, 2) == 3 * (2 + 2)


def test_a_training_graph_refuses_what_it_cannot_record():
    class Variable(torch.nn.Module):
        def forward(self, *inputs):
            return inputs

    unused = torch.nn.Module()
    unused.a, unused.b = torch.nn.Linear(4, 2).to(HPU), torch.nn.Linear(4, 2).to(HPU)
    unused.forward = unused.a.forward

    with pytest.raises(AssertionError, match="Unsupported argument type"):
        ModuleCacher()(Variable())
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        ModuleCacher()(unused)(card(1, 3, 4))
    unused.forward = unused.orig_forward
    assert ModuleCacher()(unused, allow_unused_input=True)(card(1, 3, 4)).shape == (3, 2)


def test_what_nobody_holds_is_freed_while_a_graph_is_recorded_and_not_taken_for_another():
    freed = []

    def grow(values):
        for _ in range(20):
            before = StorageWeakRef(values.untyped_storage())
            values = values * 2 + 1
            freed.append(before.expired())
        return values

    graphed = wrap_in_hpu_graph_func(grow)
    graphed(card(1, 1000))

    assert freed == [False] + 19 * [True]
    assert graphed(card(2, 1000)).tolist() == grow(torch.full((1000,), 2.0)).tolist()
