"""Two processes over gloo that train one model on halves of a batch: `two_processes.py PACKAGE HOW`.

The last line of the output is JSON: for each class what went wrong, or "". Its gradients must be those
of one process with the whole batch.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

KINDS = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")


class Net(torch.nn.Module):
    def __init__(self, package, kind):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.rnn = torch.nn.Linear(4, 5), getattr(package, kind)(5, 7)

    def forward(self, x):
        out = self.rnn(self.embed(x))
        return out[0] if isinstance(out, tuple) else out


def loss(model, x):
    return model(x).square().mean()


def attempt(package, kind, how, rank):
    torch.manual_seed(1)
    x = torch.randn(3, 6, 4) if not kind.endswith("Cell") else torch.randn(6, 4)
    half = x.unflatten(-2, (2, 3)).select(-3, rank)
    alone = Net(package, kind)
    want = torch.autograd.grad(loss(alone, x), list(alone.parameters()))
    model = Net(package, kind)
    if how == "ddp":
        run = torch.nn.parallel.DistributedDataParallel(model)
        loss(run, half).backward()
        got = [p.grad for p in model.parameters()]
    else:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model.rnn)
        fully_shard(model)
        loss(model, half).backward()
        got = [p.grad.full_tensor() for p in model.parameters()]
    torch.testing.assert_close(got, list(want), rtol=1e-4, atol=1e-6)


def work(rank, package, how, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    found = {}
    for kind in KINDS:
        try:
            attempt(importlib.import_module(package), kind, how, rank)
            found[kind] = ""
        except Exception as error:
            found[kind] = f"{type(error).__name__}: {error}"
    Path(path, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends in order


if __name__ == "__main__":
    package, how = sys.argv[1:]
    with tempfile.TemporaryDirectory() as path:
        mp.spawn(work, (package, how, path), nprocs=2)
        each = [json.loads(Path(path, f"{rank}.json").read_text()) for rank in range(2)]
    print(json.dumps({kind: each[0][kind] or each[1][kind] for kind in KINDS}))
