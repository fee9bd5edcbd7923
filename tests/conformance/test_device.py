"""`torch.hpu` and `habana_frameworks.torch.core` beside the device itself. Run: pytest tests/conformance

The headings name the files of gaudi-pytorch-bridge 1.19.0 in which a fact was read.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from habana_frameworks.emulator.graph_counter import count_graphs
from habana_frameworks.torch import core
from habana_frameworks.torch.distributed import hccl

# hpu/__init__.py


def test_in_eager_mode_there_are_no_graphs_and_lazy_calls_do_nothing():
    code = """
import torch
from habana_frameworks.torch import core, hpu
print(*(hasattr(hpu, name) for name in ("HPUGraph", "ModuleCacher", "wrap_in_hpu_graph", "make_graphed_callables")))
core.add_step_closure(print, ("closed",))
print(core.mark_step(), torch.ones(1, device="hpu").device)
"""

    said = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PT_HPU_LAZY_MODE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert said.stdout.split() == ["False"] * 4 + ["None", "hpu:0"]


@pytest.mark.parametrize("name", ["empty_cache", "reset_max_memory_allocated", "reset_max_memory_cached"])
def test_a_name_that_a_card_lacks_is_not_there(name):
    assert not hasattr(torch.hpu, name)


def test_what_is_told_to_the_card_is_remembered():
    torch.hpu.disable_dynamic_shape()
    assert not torch.hpu.get_dynamic_shape_status()
    torch.hpu.enable_dynamic_shape()
    assert torch.hpu.get_dynamic_shape_status()
    with pytest.warns(UserWarning, match="deprecated"):
        torch.hpu.setDeterministic(True)
    with pytest.warns(UserWarning, match="deprecated"):
        assert torch.hpu.getDeterministic() is True
    with pytest.warns(UserWarning, match="deprecated"):
        torch.hpu.setDeterministic(False)


def test_a_checkpoint_computes_again_in_the_cards_autocast_whatever_it_is_given():
    weight = torch.full((4, 4), 0.3, device="hpu", requires_grad=True)

    with torch.autocast("hpu", torch.bfloat16):
        squared = checkpoint(lambda: (weight @ weight).sigmoid() @ weight, use_reentrant=False)
    squared.sum().backward()  # refuses what was computed again in another type

    assert squared.dtype == torch.bfloat16
    assert weight.grad.isfinite().all()


def test_a_process_has_one_card_whatever_its_module(monkeypatch):
    monkeypatch.setenv("HLS_MODULE_ID", "3")

    with torch.hpu.device("hpu"), torch.hpu.device(0), torch.hpu.device("hpu:3"):
        assert torch.hpu.current_device() == 0
    torch.hpu.set_device(7)
    with pytest.raises(AssertionError, match="Trying to open device with idx=9"):
        torch.hpu.set_device(9)
    with pytest.raises(AssertionError, match="Requested device_id=2 is different from env_device_id=3"):
        torch.hpu.device(2)


def test_the_old_constructors_make_tensors_of_the_card():
    made = torch.hpu.LongTensor([1, 2])

    assert (made.dtype, made.device.type, made.tolist()) == (torch.int64, "hpu", [1, 2])
    with torch.hpu.device_of(made), torch.hpu.device_of(torch.ones(1)):
        assert torch.hpu.current_device() == 0
    with pytest.raises(RuntimeError, match="legacy constructor expects device"):
        torch.hpu.FloatTensor([1.0], device="cpu")


# hpu/memory.py


def test_a_process_reserves_the_whole_card():
    free, total = torch.hpu.mem_get_info()

    assert torch.hpu.memory_reserved() == torch.hpu.max_memory_reserved() == total
    assert 0 < free < total


def test_memory_is_told_of_cards_that_are_there():
    block = torch.ones(4, device="hpu")

    assert torch.hpu.memory_usage(0) == pytest.approx(torch.hpu.memory_stats(block.device)["InUse"], rel=0.2)
    assert "MaxInUse:" in torch.hpu.memory_summary()
    assert {"NumAllocs", "NumFrees", "ActiveAllocs", "MaxAllocSize"} < torch.hpu.memory_stats().keys()
    for ask in (torch.hpu.memory_stats, torch.hpu.reset_peak_memory_stats, torch.hpu.get_device_name):
        with pytest.raises(AssertionError, match="Invalid device id"):
            ask(torch.hpu.device_count())


# hpu/streams.py, hpu/events.py


def test_a_stream_is_current_within_its_context_and_has_a_number():
    stream, other = torch.hpu.Stream(), torch.hpu.Stream()
    before = torch.hpu.current_stream()

    with torch.hpu.stream(stream):
        assert torch.hpu.current_stream() == stream
        with other, torch.hpu.stream(None):
            assert torch.hpu.current_stream() == other
        assert torch.hpu.current_stream().id() == stream.id()

    assert torch.hpu.current_stream() == before == torch.hpu.default_stream()
    assert before.id() == 0
    assert len({before.id(), stream.id(), other.id()}) == 3
    torch.hpu.set_stream(stream)
    assert torch.hpu.current_stream() == stream
    torch.hpu.set_stream(before)


def test_an_event_has_one_option():
    torch.hpu.Event(enable_timing=True)
    with pytest.raises(TypeError):
        torch.hpu.Event(blocking=True)
    untimed = [torch.hpu.Event() for _ in range(2)]
    with pytest.raises(RuntimeError, match="must be recorded"):
        untimed[0].elapsed_time(untimed[1])
    for event in untimed:
        event.record()
    with pytest.raises(RuntimeError, match="need enable_timing=True"):
        untimed[0].elapsed_time(untimed[1])


def test_waiting_for_the_card_ends_a_lazy_graph():
    ones = torch.ones(3, device="hpu")
    with count_graphs() as graphs:
        for end in (torch.hpu.synchronize, torch.hpu.Event().record, torch.hpu.current_stream().synchronize):
            ones.add(1)
            end()

    assert graphs.launches == 3


def test_a_card_is_waited_for_without_naming_it():
    torch.hpu.synchronize()
    with pytest.raises(TypeError):
        torch.hpu.synchronize(0)


# hpu/random.py


def test_random_state_is_that_of_the_first_card_alone():
    state = torch.hpu.get_rng_state(0)
    drawn = torch.rand(2, device="hpu")
    torch.hpu.set_rng_state(state, "hpu:0")

    assert torch.equal(torch.rand(2, device="hpu"), drawn)
    assert torch.hpu.manual_seed(3).initial_seed() == torch.hpu.initial_seed() == 3
    assert torch.hpu.seed() == torch.hpu.initial_seed()
    assert torch.hpu.seed_all() is None
    assert torch.seed() == torch.initial_seed() == torch.hpu.initial_seed()
    with pytest.raises(RuntimeError, match="supports only device 0"):
        torch.hpu.get_rng_state("hpu:1")
    with pytest.raises(RuntimeError, match="states len of 1"):
        torch.hpu.set_rng_state_all([state, state])


# core/torch_overwrites.py


def test_a_fork_of_the_random_state_is_the_cards_too(monkeypatch):
    monkeypatch.setenv("HABANA_EMULATOR_DEVICES", "1")
    before = torch.hpu.get_rng_state()

    with torch.random.fork_rng():
        torch.manual_seed(7)
        assert not torch.equal(torch.hpu.get_rng_state(), before)

    assert torch.equal(torch.hpu.get_rng_state(), before)


# distributed/hccl/__init__.py


def test_ranks_are_those_of_torchrun_or_of_open_mpi(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "HLS_MODULE_ID"):
        monkeypatch.delenv(name, raising=False)
    assert hccl.initialize_distributed_hpu() == (1, -1, -1)
    for name, value in (("SIZE", "16"), ("RANK", "9"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)

    assert hccl.initialize_distributed_hpu() == (16, 9, 1)
    assert (os.environ["RANK"], os.environ["HLS_MODULE_ID"]) == ("9", "1")
    assert hccl.initialize_distributed_hpu(2, 0, 0) == (2, 0, 0)


# core/step_closure.py


def test_a_closure_runs_once_at_the_next_mark_step():
    seen = []
    core.add_step_closure(seen.append, (1,))

    assert core.mark_step("", sync=True) is None
    core.mark_step()
    core.iter_mark_step()

    assert seen == [1]


# core/quantization.py


def test_inference_is_prepared_and_left():
    model = torch.nn.Linear(2, 2).eval()

    assert core.hpu_set_inference_env() is None
    assert core.hpu_set_inference_env(model) is model
    core.hpu_inference_initialize(model.to("hpu"), mark_only_scales_as_const=True)
    core.hpu_teardown_inference_env()
    assert core.hpu_set_env(model) is model
    core.hpu_initialize(model, optimizer=None, args=None)
    core.hpu_reset_env()


# dynamo/compile_backend/backends.py


def test_compiled_code_runs_as_it_does_without_and_each_key_of_inputs_is_a_graph():
    module = torch.nn.Linear(3, 3).to("hpu")
    compiled = torch.compile(module, backend="hpu_backend")
    double = torch.compile(backend="hpu_backend")(lambda tensor: tensor * 2)
    rows = [torch.ones(length, 3, device="hpu") for length in (2, 3, 2)]

    with count_graphs() as graphs:
        made = [double(compiled(row)) for row in rows]

    assert (len(graphs.hpu), graphs.hpu.total()) == (4, 6)
    assert all(torch.equal(each, module(row) * 2) for each, row in zip(made, rows, strict=True))
    assert list(compiled.state_dict()) == ["_orig_mod.weight", "_orig_mod.bias"]


# activity_profiler/activity_profiler.py


def test_a_profile_of_the_card_writes_a_trace(tmp_path):
    profiler = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.HPU],
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(tmp_path)),
    )

    with profiler:
        for _ in range(2):
            torch.ones(2, 2, device="hpu").matmul(torch.ones(2, 2, device="hpu"))
            profiler.step()

    (trace,) = tmp_path.glob("*.json")
    assert "aten::matmul" in trace.read_text()


# backend/random.cpp


@pytest.mark.parametrize(
    "draw",
    [
        lambda generator: torch.empty(8, device="hpu").uniform_(-1, 2, generator=generator),
        lambda generator: torch.empty(8, device="hpu").log_normal_(generator=generator),
        lambda generator: torch.ones(8, device="hpu").multinomial(8, generator=generator),
        lambda generator: torch.rand(8, device="hpu", generator=generator),
    ],
)
def test_numbers_of_the_card_come_from_a_generator_of_the_host(draw):
    generator = torch.Generator().manual_seed(3)

    first, second = draw(generator), draw(generator)

    assert first.device.type == "hpu"
    assert torch.equal(first, draw(torch.Generator().manual_seed(3)))
    assert not torch.equal(first, second)
