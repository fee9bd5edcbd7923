"""python -m pytest tests/test_emulator_device.py: hpu as a device of torch, graphs, and what guards a real Gaudi."""

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from habana_frameworks.emulator.graph_counter import count_graphs
from habana_frameworks.torch.core import mark_step

ROOT = Path(__file__).parent.parent
HPU = torch.device("hpu", 0)
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script", "ignore:'pin_memory' argument")


def run_python(code, *arguments, check=True, **environment):
    """Runs `code` in a Python of its own; what a process sees before it uses the device can't be seen in this one."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=check,
    )


def test_a_process_is_on_the_cpu_until_it_uses_hpu_and_says_so_once():
    code = """
import torch
print(torch.ones(1).device)
for _ in range(2): torch.ones(1, device="hpu")
print(torch.ones(1).device, torch.ones(1).hpu().device, torch.hpu.device_count())
list(torch.utils.data.DataLoader(torch.ones(2), pin_memory=True))
"""

    result = run_python(code, HABANA_EMULATOR_DEVICES="3")

    assert result.stdout.split() == ["cpu", "cpu", "hpu:0", "3"]
    assert result.stderr == "Emulating Gaudi on the CPU: speed and memory say nothing about a real card.\n"


@pytest.mark.parametrize("device", ["hpu", "hpu:0", HPU], ids=str)
def test_every_way_to_ask_for_hpu_gives_it(device):
    made = [
        torch.ones(2, device=device),
        torch.empty_like(torch.ones(2), device=device),
        torch.ones(2).to(device),
        torch.ones(2).to(device=device, dtype=torch.bfloat16),
        torch.ones(2).new_zeros(3, device=device),
        torch.nn.Linear(2, 2, device=device).weight,
        torch.nn.Linear(2, 2).to(device).weight,
    ]

    assert all(tensor.device == HPU and tensor.is_hpu and tensor.get_device() == 0 for tensor in made)


def test_the_type_of_a_tensor_names_hpu_and_can_be_changed():
    tensor = torch.ones(1, device="hpu")

    assert tensor.type() == "torch.hpu.FloatTensor"
    assert tensor.type("torch.hpu.BFloat16Tensor").type() == tensor.bfloat16().type() == "torch.hpu.BFloat16Tensor"


def test_a_bare_index_means_hpu():
    assert torch.ones(2, device=0).device == torch.ones(2).to(0).device == HPU


def test_a_device_context_makes_tensors_there():
    with torch.device("hpu"):
        assert torch.zeros(2).device == HPU
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"
        assert torch.nn.Linear(2, 2).weight.is_meta
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.nn.Linear(2, 2, device="meta").to_empty(device="hpu").weight.device == HPU


def test_factories_stay_functions_for_classes_and_torchscript():
    class Keeper:
        make = torch.zeros

    @torch.jit.script
    def scripted(length: int):
        return torch.zeros([length])

    assert Keeper().make(3).tolist() == scripted(3).tolist() == [0, 0, 0]


def test_a_generator_on_hpu_repeats_its_numbers():
    draws = [torch.rand(3, generator=torch.Generator("hpu").manual_seed(1), device="hpu") for _ in range(2)]

    assert torch.equal(*draws)
    assert isinstance(torch.default_generator, torch.Generator)


def test_the_random_state_of_hpu_can_be_kept_and_forked():
    state = torch.hpu.get_rng_state_all()
    first = torch.rand(3, device="hpu")
    with torch.random.fork_rng(devices=[0], device_type="hpu"):
        torch.hpu.manual_seed_all(7)
        torch.rand(3)
    torch.hpu.set_rng_state_all(state)

    assert torch.equal(first, torch.rand(3, device="hpu"))


def test_autocast_for_hpu_computes_in_bfloat16_and_can_be_left():
    matrix = torch.ones(2, 2, device="hpu")

    with torch.autocast("hpu", dtype=torch.bfloat16):
        inside = matrix @ matrix
        with torch.autocast("hpu", enabled=False):
            nested = matrix @ matrix
        assert torch.hpu.is_autocast_hpu_enabled()

    assert [inside.dtype, nested.dtype, (matrix @ matrix).dtype] == [torch.bfloat16, torch.float32, torch.float32]


def test_another_thread_sees_the_device_too():
    devices = []
    thread = threading.Thread(target=lambda: devices.append(torch.ones(1, device="hpu").device))
    thread.start()
    thread.join()

    assert devices == [HPU]


def test_data_loader_workers_deliver_their_batches():
    rows = torch.arange(8.0)
    torch.hpu.init()

    batches = [batch for (batch,) in DataLoader(TensorDataset(rows), 4, num_workers=2, pin_memory=True)]

    assert torch.equal(torch.cat(batches), rows)


def test_saved_tensors_load_without_the_emulator(tmp_path):
    parameter = torch.nn.Parameter(torch.arange(3.0, device="hpu"))
    model = torch.nn.Linear(2, 2).to("hpu")
    torch.save({"parameter": parameter, "model": model.state_dict()}, tmp_path / "saved.pt")
    code = """
import sys, torch
saved = torch.load(sys.argv[1], weights_only=False)
print(hasattr(torch, "hpu"), saved["parameter"].tolist(), saved["model"]["weight"].device)
"""

    result = run_python(code, tmp_path / "saved.pt", TORCH_DEVICE_BACKEND_AUTOLOAD="0")

    assert result.stdout.strip() == "False [0.0, 1.0, 2.0] cpu"


@pytest.mark.parametrize("place", [None, "hpu", HPU, "cpu"], ids=str)
def test_a_file_written_on_a_gaudi_loads(tmp_path, monkeypatch, place):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "hpu:0")
    torch.save({"weight": torch.arange(3.0)}, tmp_path / "gaudi.pt")

    loaded = torch.load(tmp_path / "gaudi.pt", map_location=place)

    assert loaded["weight"].tolist() == [0, 1, 2]


def test_memory_figures_follow_the_process():
    gc.collect()  # what earlier tests have left would be given back in between
    torch.hpu.reset_peak_memory_stats()
    before = torch.hpu.memory_stats()
    block = torch.ones(64 << 20, dtype=torch.uint8, device="hpu")
    during = torch.hpu.memory_stats()
    del block

    peak = torch.hpu.max_memory_allocated()
    torch.hpu.reset_peak_memory_stats()

    assert 48 << 20 < during["InUse"] - before["InUse"] < 80 << 20
    assert peak - before["InUse"] > 48 << 20
    assert torch.hpu.max_memory_allocated() - before["InUse"] < 16 << 20
    assert during["InUse"] < during["Limit"]


def test_events_measure_milliseconds():
    start, end = (torch.hpu.Event(enable_timing=True) for _ in range(2))
    with torch.hpu.stream(torch.hpu.Stream()) as stream:
        start.record(stream)
        threading.Event().wait(0.02)
        end.record()
    torch.hpu.synchronize()

    assert 15 < start.elapsed_time(end) < 2000


def test_lazy_graphs_end_at_mark_steps_and_where_the_host_reads():
    with count_graphs() as graphs:
        for length in (2, 2, 3):
            torch.ones(length).add(1)
            mark_step()
        torch.ones(2).add(1).cpu()
        torch.ones(2).add(1).sum().item()
        mark_step()

    assert (graphs.distinct, graphs.launches) == (3, 5)
    assert sorted(graphs.lazy.values()) == [1, 1, 3]


def test_the_emulator_refuses_to_be_imported_beside_the_real_plugin(tmp_path):
    real = tmp_path / "elsewhere" / "habana_torch_plugin-1.24.0.dist-info"
    real.mkdir(parents=True)
    (real / "METADATA").write_text("Metadata-Version: 2.1\nName: habana-torch-plugin\nVersion: 1.24.0.695\n")

    result = run_python("import sys; sys.path.append(sys.argv[1]); import torch", real.parent, check=False)

    assert result.returncode == 1
    assert "habana-torch-plugin 1.24.0.695 is installed: uninstall the emulator" in result.stderr


def test_the_emulator_refuses_to_be_built_on_a_gaudi_host(tmp_path):
    tool = tmp_path / "hl-smi"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)

    result = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(tmp_path)],
        cwd=ROOT / "emulator",
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 1
    assert result.stderr.startswith("error: the emulator of habana-torch-plugin is for machines without a Gaudi")
    assert not list(tmp_path.glob("*.whl"))
