"""Distribution and training stacks."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from twins import flatten

from .items import (
    LAYERS,
    build,
    close,
    example,
    first,
    gradients,
    item,
    loss_of,
    weight,
)

TRAINING = "Distribution and training stacks"


@cache
def two_processes(package: str, how: str) -> dict[str, str]:
    """The failure, or "", of each class under `how`, from two processes over gloo."""
    script = Path(__file__).with_name("two_processes.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, package, how],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=script.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@item(TRAINING, "`DistributedDataParallel` over gloo, two processes: the gradients of one")
def ddp(package, kind):
    assert not (error := two_processes(package.__name__, "ddp")[kind]), error


@item(TRAINING, "FSDP2 `fully_shard`, two processes: the gradients of one")
def fsdp(package, kind):
    assert not (error := two_processes(package.__name__, "fsdp")[kind]), error


def same_as_torch(package, kind, change):
    """After `change` to a module of each package, the same answers and gradients."""
    results = []
    for own in (package, nn):
        module = build(own, kind)
        torch.manual_seed(1)
        change(module)
        module.eval()  # spectral norm iterates at each call in training
        x = torch.linspace(-1, 1, 60).view(4, 3, 5)
        x = x[0] if kind.endswith("Cell") else x
        results.append((*flatten(module(x)), *gradients(module, x)))
    close(*results)


for name, function in (
    ("weight_norm", parametrizations.weight_norm),
    ("spectral_norm", parametrizations.spectral_norm),
    ("orthogonal", parametrizations.orthogonal),
):

    @item(TRAINING, f"`parametrizations.{name}`")
    def parametrization(package, kind, function=function):
        same_as_torch(package, kind, lambda module: function(module, weight(kind)))


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


@item(TRAINING, "`parametrize.register_parametrization`, and its removal")
def parametrized(package, kind):
    def there(module):
        parametrize.register_parametrization(module, weight(kind), Doubled())

    def and_back(module):
        there(module)
        parametrize.remove_parametrizations(module, weight(kind))

    same_as_torch(package, kind, there)
    same_as_torch(package, kind, and_back)


@item(TRAINING, "pruning (`torch.nn.utils.prune`), and making it permanent")
def pruned(package, kind):
    def cut(module):
        prune.l1_unstructured(module, weight(kind), amount=0.5)

    def for_good(module):
        cut(module)
        prune.remove(module, weight(kind))

    same_as_torch(package, kind, cut)
    same_as_torch(package, kind, for_good)


@item(TRAINING, "clipped gradients, SWA and EMA copies, `GradScaler`")
def training_loop(package, kind):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    results = []
    for own in (package, nn):
        model = build(own, kind)
        averages = [AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))]
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        torch.manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, example(kind))).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            for average in averages:
                average.update_parameters(model)
        x = example(kind)
        results.append(tuple(first(m(x)) for m in (model, *averages)))
    close(*results, 1e-3, 1e-4)


@item(TRAINING, "a `LightningModule` under Lightning's `Trainer`", LAYERS)
def lightning_trains(package, kind):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, rnn):
            super().__init__()
            self.rnn, self.losses = rnn, []

        def training_step(self, batch, _):
            loss = loss_of(self.rnn, batch[0])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.001)

    losses = []
    for own in (package, nn):
        module = Module(build(own, kind))
        torch.manual_seed(1)
        data = torch.utils.data.TensorDataset(torch.randn(4, 6, 3, 5))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = lightning.Trainer(
                max_epochs=2,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
        losses.append(torch.tensor(module.losses))
    assert len(losses[0]) == 8
    assert losses[0][4:].sum() < losses[0][:4].sum()
    close(*losses)
