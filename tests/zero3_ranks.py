"""A rank of tests/test_emulator_training.py: hccl collectives, then three ZeRO-3 steps of a small model.

Each rank writes FOLDER/RANK.json. The global batch of 8 rows is cut into one part a rank, so that the weights must be
those of a single process that sees all 8.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

STEPS, ROWS = 3, 8
ADAMW = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-12}


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))


def loss_of(model, step: int, part: slice) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    inputs, targets = (torch.randn(ROWS, size, generator=generator)[part] for size in (8, 4))
    return torch.nn.functional.mse_loss(model(inputs.to("hpu")), targets.to("hpu"))


def refusal(collective, *arguments) -> str:
    """What hccl says to it, or "accepted"."""
    try:
        collective(*arguments)
    except RuntimeError as error:
        return str(error)
    return "accepted"


def collectives(rank: int) -> dict:
    """What hccl refuses, and what it makes of numbers that float32 lacks."""
    odd, twice, half = 2**24 + 1, [1.0 + rank] * 2, torch.ones(2, dtype=torch.float16, device="hpu")
    sums = {}
    for name in ("all_reduce", "reduce", "reduce_scatter_tensor"):
        given = torch.tensor([odd, odd] if rank == 0 else [0, 0], device="hpu")
        if name == "all_reduce":
            dist.all_reduce(given)
        elif name == "reduce":
            dist.reduce(given, dst=1)
        else:
            dist.reduce_scatter_tensor(given, torch.cat([given, given]))
        sums[name] = given.tolist()
    gathered = [None, None]
    dist.all_gather_object(gathered, {"rank": rank})
    on_card = torch.tensor(twice, device="hpu")
    dist.all_reduce(half)
    highest = torch.tensor(twice, device="hpu")
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return {
        "integers": sums,
        "half": half.tolist(),
        "highest": highest.tolist(),
        "objects": gathered,
        "host": refusal(dist.all_reduce, torch.tensor(twice)),
        "host sent": refusal(dist.send, torch.tensor(twice), 1 - rank),
        "mean": refusal(dist.all_reduce, on_card, dist.ReduceOp.AVG),
        "bits": refusal(dist.all_reduce, on_card, dist.ReduceOp.BAND),
        "lists": refusal(dist.all_gather_coalesced, [[on_card, on_card]], [on_card]),
        "any sender": refusal(dist.recv, on_card),
        "short moved": refusal(dist.all_to_all_single, on_card.short(), on_card.short()),
        "short": refusal(dist.all_reduce, on_card.short()),
        "still": on_card.tolist(),
    }


def main() -> None:
    import deepspeed

    deepspeed.init_distributed()  # picks hccl by itself
    rank, world = dist.get_rank(), dist.get_world_size()
    total = torch.tensor([rank + 1.0], device="hpu")
    dist.all_reduce(total)
    dist.barrier()
    unwaited = torch.ones(1_000_000, device="hpu")
    dist.all_reduce(unwaited, async_op=True)  # a Gaudi orders the sum behind it
    unwaited_sum = unwaited.sum()

    said = collectives(rank)

    config = {
        "train_micro_batch_size_per_gpu": ROWS // world,
        "optimizer": {"type": "AdamW", "params": ADAMW},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    model = make_model()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    for step in range(STEPS):
        engine.backward(loss_of(engine, step, slice(rank * ROWS // world, (rank + 1) * ROWS // world)))
        engine.step()
    held = [parameter.numel() for parameter in model.parameters()]
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = [parameter.flatten().tolist() for parameter in model.parameters()]
    facts = {
        "backend": dist.get_backend(),
        "total": total.item(),
        "unwaited": unwaited_sum.item(),
        "held": held,
        "weights": weights,
        "hccl": said,
    }
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(facts))
    dist.destroy_process_group()  # or its threads may end the interpreter with "terminate called"


if __name__ == "__main__":
    main()
