"""A rank whose first one works for longer than collectives may take: tests/test_ranks.py starts two of them."""

import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import torch.distributed as dist

from align.training.ranks import all_ranks, first_of_node_first


def main() -> None:
    folder, rank = sys.argv[1], int(sys.argv[2])
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=2))
    args = SimpleNamespace(process_index=rank, local_process_index=rank, world_size=2)
    with first_of_node_first(args, "data"):
        began = time.time()
        time.sleep(4 if rank == 0 else 1)
        ended = time.time()
    print((began, ended, time.time()), len(all_ranks(rank)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
