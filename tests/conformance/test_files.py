"""Where a card's tensors are after files, pickles and copies. Run: pytest tests/conformance/test_files.py

Read in gaudi-pytorch-bridge 1.19.0, core/torch_overwrites.py.
"""

import copy
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from safetensors.torch import load_file, save_file


def place(tensor):
    return tensor.device.type


def test_in_lazy_mode_a_file_holds_plain_containers_of_tensors_of_the_host():
    weight = torch.nn.Parameter(torch.arange(3.0, device="hpu"))
    torch.save(OrderedDict(weight=weight, tied=(weight, [weight, 1])), "saved.pt")

    loaded = torch.load("saved.pt", weights_only=True)

    assert type(loaded) is dict
    assert type(loaded["weight"]) is torch.Tensor
    assert loaded["weight"].tolist() == [0, 1, 2]
    first, (second, one) = loaded["tied"]
    assert {place(each) for each in (loaded["weight"], first, second)} == {"cpu"}
    assert len({each.data_ptr() for each in (loaded["weight"], first, second)}) == 3
    assert one == 1


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, "cpu"),
        ("cpu", "cpu"),
        ("hpu", "hpu"),
        (torch.device("hpu", 0), "hpu"),
        ({"cpu": "hpu:0"}, "hpu"),
        ({"hpu:0": "hpu:0"}, "cpu"),
        (lambda tensor, device: tensor.to("hpu"), "hpu"),
    ],
    ids=str,
)
def test_in_lazy_mode_tensors_are_loaded_where_one_says_and_else_on_the_host(asked, expected):
    torch.save([torch.ones(2, device="hpu")], "saved.pt")

    (loaded,) = torch.load("saved.pt", map_location=asked)

    assert place(loaded) == expected


def test_a_state_goes_through_a_file_and_back_to_the_card():
    model = torch.nn.Linear(2, 2).to("hpu")
    torch.save(model.state_dict(), "model.pt")
    again = torch.nn.Linear(2, 2).to("hpu")

    again.load_state_dict(torch.load("model.pt", weights_only=True))

    assert torch.equal(again.weight, model.weight)
    assert place(again.weight) == "hpu"


def test_safetensors_loads_where_it_is_told():
    save_file({"weight": torch.arange(3.0, device="hpu")}, "saved.safetensors")

    assert place(load_file("saved.safetensors")["weight"]) == "cpu"
    assert place(load_file("saved.safetensors", device="hpu")["weight"]) == "hpu"


@pytest.mark.parametrize("again", [lambda value: pickle.loads(pickle.dumps(value)), copy.deepcopy, copy.copy])
def test_a_pickled_or_copied_tensor_is_where_it_was(again):
    on_card = torch.nn.Parameter(torch.ones(2, device="hpu"))
    model = torch.nn.Linear(2, 2).to("hpu")

    assert place(again(on_card)) == place(again(model).weight) == "hpu"
    assert type(again(on_card)) is torch.nn.Parameter
    assert place(again(torch.ones(2))) == "cpu"


@pytest.mark.parametrize("share", [torch.Tensor.share_memory_, ForkingPickler.dumps])
def test_a_tensor_of_the_card_is_shared_with_no_process(share):
    with pytest.raises(RuntimeError, match="cannot be shared with another process"):
        share(torch.ones(2, device="hpu"))
    share(torch.ones(2))


def test_a_worker_of_a_process_on_the_card_cannot_use_it():
    torch.hpu.init()
    loader = torch.utils.data.DataLoader([1.0], num_workers=1, collate_fn=lambda rows: torch.tensor(rows, device="hpu"))

    with pytest.raises(RuntimeError, match="Cannot use the card in a forked process"):
        next(iter(loader))


def test_in_eager_mode_a_file_says_where_its_tensors_were():
    code = """
import pickle, torch
weight = torch.nn.Parameter(torch.arange(3.0, device="hpu"))
torch.save({"weight": weight, "tied": weight}, "saved.pt")
loaded = torch.load("saved.pt")
again, tied = loaded["weight"], loaded["tied"]
print(again.device, type(again).__name__, tied.data_ptr() == again.data_ptr())
print(torch.load("saved.pt", map_location="cpu")["weight"].device, pickle.loads(pickle.dumps(weight)).device)
"""

    def run(code, **variables):
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)

    assert run(code, PT_HPU_LAZY_MODE="0").stdout.split() == ["hpu:0", "Parameter", "True", "cpu", "hpu:0"]
    elsewhere = run("import torch; torch.load('saved.pt')", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert "map_location=torch.device('cpu')" in elsewhere.stderr
