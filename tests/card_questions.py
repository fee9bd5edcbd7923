"""What the emulator takes from the sources of another version of the plugin, asked of the one that is there.

python tests/card_questions.py prints each question with its answer and what the emulator answers. `make test-hpu` runs
it on a card, where a line that differs is what the emulator has to learn (docs/emulator.md).
"""

import io
import json
import pickle
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

import habana_frameworks.torch  # noqa: F401 - in lazy mode torch does not load the plugin by itself
from habana_frameworks.torch.hpex.kernels import FusedSDPA, RotaryPosEmbeddingHelperV2
from habana_frameworks.torch.hpex.normalization import FusedRMSNorm
from habana_frameworks.torch.hpex.optimizers import FusedAdamW

HPU = torch.device("hpu")
# What tests/test_hpu.py asks of processes, and what the emulator answers
OF_PROCESSES = {
    "metrics: files": "metrics-rank0.json",
    "metrics: names": "cpu_fallback, graph_compilation, memory_defragmentation",
    "lazy mode: import torch loads the plugin": "True",
}


def ones(*shape: int, **options) -> torch.Tensor:
    return torch.ones(*shape, **options).to(HPU)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def outcome(attempt: Callable[[], Any]) -> str:
    """What it gives, or "refused"."""
    try:
        return str(attempt())
    except Exception:  # whatever a card raises
        return "refused"


OPERATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "add": lambda x: x + x.bfloat16(),
    "mul": lambda x: x * x,
    "div": lambda x: x / 2,
    "pow": lambda x: x.pow(2),
    "exp": lambda x: x.exp(),
    "log": lambda x: x.log(),
    "rsqrt": lambda x: x.rsqrt(),
    "mean": lambda x: x.mean(),
    "sum": lambda x: x.sum(),
    "cat": lambda x: torch.cat([x, x.bfloat16()]),
    "matmul": lambda x: x @ x,
    "linear": lambda x: functional.linear(x, x),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "layer_norm": lambda x: functional.layer_norm(x, (4,)),
    "dropout": lambda x: functional.dropout(x, 0.5),
    "embedding": lambda x: functional.embedding(ones(1, dtype=torch.int64), x.bfloat16()),
    "cross_entropy": lambda x: functional.cross_entropy(x.bfloat16(), ones(4, dtype=torch.int64)),
    "masked_fill": lambda x: x.masked_fill(x > 0, 0.0),
}
WIDE = "sum masked_fill add div pow exp log rsqrt cat logsumexp embedding cross_entropy".split()


def autocast_type(operation: Callable[[torch.Tensor], torch.Tensor]) -> str:
    with torch.autocast("hpu", torch.bfloat16):
        return name_of(operation(ones(4, 4)).dtype)


def attention_with(filled: float, recompute: bool) -> str:
    """Whether result and gradients are finite where one row of queries sees no key."""
    query = ones(1, 1, 4, 8, dtype=torch.bfloat16).requires_grad_()
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 2, :] = filled
    result = FusedSDPA.apply(query, query, query, mask.bfloat16().to(HPU), 0.0, False, None, "None", recompute)
    result.float().sum().backward()
    return "finite" if result.isfinite().all() and query.grad.isfinite().all() else "not finite"


def packed_attention(recompute: bool) -> str:
    """How result and gradients of two samples in one row, with grouped heads, compare with float32 on the host."""
    torch.manual_seed(0)
    states = [torch.randn(1, heads, 64, 32).bfloat16() for heads in (8, 2, 2)]
    segments = torch.arange(64) >= 40
    visible = (segments[:, None] == segments) & torch.ones(64, 64, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, 64, 64).masked_fill(~visible, torch.finfo(torch.bfloat16).min).bfloat16()
    expected = [tensor.float().requires_grad_() for tensor in states]
    wanted = functional.scaled_dot_product_attention(*expected, visible, enable_gqa=True)
    wanted.sum().backward()

    found = [tensor.to(HPU).requires_grad_() for tensor in states]
    result = FusedSDPA.apply(*found, mask.to(HPU), 0.0, False, None, "None", recompute, None, "None")
    result.float().sum().backward()
    pairs = [(result, wanted), *((one.grad, other.grad) for one, other in zip(found, expected, strict=True))]
    error = max(((one.cpu().float() - other).norm() / other.norm()).item() for one, other in pairs)
    return "the same" if error < 0.02 else f"off by {error:.2g}"


def second_call_in_the_first_ones_output() -> bool:
    graphed = torch.hpu.wrap_in_hpu_graph(torch.nn.Linear(2, 2, bias=False).to(HPU))
    with torch.no_grad():
        first = graphed(ones(1, 2))
        before = first.cpu().clone()
        graphed(3 * ones(1, 2))
        return not torch.equal(first.cpu(), before)


def reduced(collective: Callable, dtype: torch.dtype, number: int) -> int:
    tensor = torch.tensor([number], dtype=dtype).to(HPU)
    if collective is dist.reduce_scatter_tensor:
        dist.reduce_scatter_tensor(tensor, tensor.clone())
    else:
        dist.all_reduce(tensor)
    return tensor.item()


def fast_softmax_learns_in_recompute_mode() -> str:
    query = ones(1, 1, 4, 8).requires_grad_()
    return name_of(FusedSDPA.apply(query, query, query, None, 0.0, False, None, "fast", True).dtype)


def attended_type(dtype: torch.dtype = torch.float32, **options) -> str:
    """Of values of this type, with queries and keys of float32."""
    states = ones(1, 1, 4, 8)
    mask, is_causal = options.get("mask"), options.get("is_causal", False)
    return name_of(FusedSDPA.apply(states, states, states.to(dtype), mask, 0.0, is_causal).cpu().dtype)


def experts_type(dtype: torch.dtype = torch.float32) -> str:
    """Of weights of this type, with tokens of float32."""
    weights, tokens = [ones(8, 8, dtype=dtype)], ones(2, 8)
    routed = torch.zeros(2, 1, dtype=torch.int64).to(HPU), ones(2, 1)
    made = torch.ops.hpu.mixture_of_experts(tokens, *routed, weights, weights, weights, True, "silu", 0, 0)
    return name_of(made.cpu().dtype)


def in_autocast(attempt: Callable[[], str]) -> str:
    with torch.autocast("hpu", torch.bfloat16):
        return attempt()


def normed_type(dtype: torch.dtype = torch.bfloat16) -> str:
    return name_of(FusedRMSNorm.apply(ones(2, 8, dtype=dtype), ones(8), 1e-6).dtype)


def rotated_type() -> str:
    table = ones(1, 1, 4, 8)
    return name_of(RotaryPosEmbeddingHelperV2.apply(ones(1, 1, 4, 8, dtype=torch.bfloat16), table, table, None).dtype)


def pinned_batch() -> torch.Tensor:
    return next(iter(torch.utils.data.DataLoader([1], collate_fn=lambda rows: ones(1), pin_memory=True)))


def loaded() -> torch.Tensor:
    """A weight of the card that went through a file."""
    file = io.BytesIO()
    torch.save({"weight": torch.nn.Parameter(ones(2))}, file)
    file.seek(0)
    return torch.load(file, weights_only=False)["weight"]


def confused_keys() -> bool:
    """Whether a graph takes -2 for -1, whose hashes are the same."""
    graphed = torch.hpu.wrap_in_hpu_graph_func(lambda tensor, factor: tensor * factor)
    graphed(ones(1), -1)
    return graphed(ones(1), -2).item() == -1


def questions() -> dict[str, tuple[Callable[[], Any], str]]:
    """What to ask, and what the emulator answers."""
    asked: dict[str, tuple[Callable[[], Any], str]] = {}
    for name, operation in OPERATIONS.items():
        asked[f"autocast: {name}"] = partial(autocast_type, operation), "float32" if name in WIDE else "bfloat16"
    for recompute in (False, True):
        how = f"attention, softmax {'recomputed' if recompute else 'kept'}"
        lowest = torch.finfo(torch.bfloat16).min
        asked[f"{how}: a row that sees nothing by bfloat16's lowest"] = (
            partial(attention_with, lowest, recompute),
            "finite",
        )
        asked[f"{how}: a row that sees nothing by -inf"] = partial(attention_with, -torch.inf, recompute), "finite"
        asked[f"{how}: two samples in a row"] = partial(packed_attention, recompute), "the same"
    odd, whole = 2**24 + 1, ones(2, 4, dtype=torch.int32)
    return asked | {
        "attention: fast softmax with gradients in recompute mode": (fast_softmax_learns_in_recompute_mode, "refused"),
        "attention: float32 in autocast": (partial(in_autocast, attended_type), "float32"),
        "attention: bfloat16 values with float32 queries": (partial(attended_type, torch.bfloat16), "refused"),
        "attention: a mask with is_causal": (partial(attended_type, mask=ones(1, 1, 4, 4), is_causal=True), "float32"),
        "experts: float32 in autocast": (partial(in_autocast, experts_type), "float32"),
        "experts: bfloat16 weights with float32 tokens": (partial(experts_type, torch.bfloat16), "float32"),
        "attention: arguments by name": (lambda: FusedSDPA.apply(*[ones(1, 1, 4, 8)] * 3, attn_mask=None), "refused"),
        "rotary: bfloat16 by float32 tables": (rotated_type, "float32"),
        "norm: bfloat16 by float32 weights": (normed_type, "float32"),
        "norm: float32 in autocast": (partial(in_autocast, partial(normed_type, torch.float32)), "float32"),
        "norm: whole numbers": (lambda: FusedRMSNorm.apply(whole, ones(4), 1e-6).cpu(), "refused"),
        "a tensor of the host: added": (lambda: str(ones(2) + torch.ones(2)), "refused"),
        "a tensor of the host: compared": (lambda: torch.eq(torch.ones(2), ones(2)).cpu(), "refused"),
        "a tensor of the host: where to copy": (
            lambda: ones(2).index_copy_(0, torch.tensor([1]), ones(1)).cpu(),
            "refused",
        ),
        "a tensor of the host: as a gradient": (
            lambda: ones(2).requires_grad_().mul(2).backward(torch.ones(2)),
            "refused",
        ),
        "a batch of the card: pinned": (pinned_batch, "refused"),
        "adamw: a negative rate": (lambda: FusedAdamW([ones(2).requires_grad_()], lr=-1.0), "refused"),
        "graphs: the second call writes into the first one's output": (second_call_in_the_first_ones_output, "True"),
        "graphs: -1 and -2 are one key": (confused_keys, "True"),
        "files: where a saved weight is loaded": (lambda: loaded().device.type, "cpu"),
        "files: what a saved weight is": (lambda: type(loaded()).__name__, "Tensor"),
        "files: where a pickled tensor comes back": (lambda: pickle.loads(pickle.dumps(ones(2))).device.type, "hpu"),
        "files: shared with another process": (lambda: ones(2).share_memory_(), "refused"),
        "hccl: all_reduce of 2^24 + 1, int64": (partial(reduced, dist.all_reduce, torch.int64, odd), str(odd - 1)),
        "hccl: all_reduce of 2^24 + 1, int32": (partial(reduced, dist.all_reduce, torch.int32, odd), str(odd - 1)),
        "hccl: reduce_scatter of 2^24 + 1, int32": (
            partial(reduced, dist.reduce_scatter_tensor, torch.int32, odd),
            str(odd),
        ),
        "hccl: a tensor of the host": (lambda: dist.all_reduce(torch.ones(1)), "refused"),
        "hccl: from any sender": (lambda: dist.recv(ones(1)), "refused"),
        "hccl: AVG": (lambda: dist.all_reduce(ones(1), dist.ReduceOp.AVG), "refused"),
        "hccl: int16": (lambda: dist.all_reduce(ones(1, dtype=torch.int16)), "refused"),
        "torch.hpu: empty_cache is there": (lambda: hasattr(torch.hpu, "empty_cache"), "False"),
        "torch.hpu: reset_max_memory_allocated is there": (
            lambda: hasattr(torch.hpu, "reset_max_memory_allocated"),
            "False",
        ),
        "events: the argument blocking": (lambda: torch.hpu.Event(blocking=True), "refused"),
        "random numbers: dropout on the card leaves the host's alone": (card_draws_its_own, "True"),
    }


def card_draws_its_own() -> bool:
    torch.manual_seed(0)
    untouched = torch.rand(1)
    torch.manual_seed(0)
    functional.dropout(ones(100), 0.5)
    return torch.equal(torch.rand(1), untouched)


def as_table() -> list[str]:
    """The rows of docs/emulator.md: what is asked about, what the emulator answers, and to which questions."""
    answers = {question: emulated for question, (_, emulated) in questions().items()} | OF_PROCESSES
    rows: dict[tuple[str, str], list[str]] = {}
    for question, emulated in answers.items():
        subject, _, asked = question.rpartition(": ")
        rows.setdefault((subject, emulated), []).append(asked)
    return [f"| {subject} | {emulated} | {'; '.join(asked)} |" for (subject, emulated), asked in sorted(rows.items())]


def ask() -> list[dict[str, str]]:
    """One row for each question, in a world of this process alone."""
    dist.init_process_group("hccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return [
            {"question": question, "answer": outcome(attempt), "emulator": emulated}
            for question, (attempt, emulated) in questions().items()
        ]
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    ROWS = ask()
    for ROW in ROWS:
        same = "" if ROW["answer"] == ROW["emulator"] else f"   the emulator: {ROW['emulator']}"
        print(f"{ROW['question']}: {ROW['answer']}{same}")
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w", encoding="utf-8") as report:
            json.dump(ROWS, report, indent=2)
