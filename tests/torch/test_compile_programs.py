"""What programs and compilers do with the operator: changes in place, batches of gradients, caches."""

from __future__ import annotations

import pytest
import torch

import rnnfast
from rnnfast import _C
from twins import flatten, make

every_suffix = pytest.mark.parametrize("suffix", ["", "Cell"])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
def test_sequences_without_steps_are_refused(cell, backend, grad):
    """In torch's words. torch's own traced LSTM returns memory that it has not written."""
    compiled = torch.compile(make(rnnfast, cell, 5, 7), backend=backend)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="larger than 0 in RNN"):
        compiled(torch.randn(0, 3, 5))


def test_a_number_of_steps_that_depends_on_data():
    module = rnnfast.GRU(5, 7)
    compiled = torch.compile(
        lambda x, kept: module(x[kept.nonzero()[:, 0]])[0], backend="eager", fullgraph=True
    )
    x, kept = torch.randn(6, 3, 5), torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.testing.assert_close(compiled(x, kept), module(x[kept])[0])


class Changed(torch.nn.Module):
    """Changes all outputs of the layer in place."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        outputs = flatten(self.rnn(x))
        for t in outputs:
            t *= 2
            t[..., :3] = 0
        return outputs


def exported(module, x):
    return torch.export.export(module, (x,)).module()


def exported_without_gradients(module, x):
    with torch.no_grad():
        return exported(module, x)


WAYS = {
    **{
        backend: lambda module, x, backend=backend: torch.compile(module, backend=backend)
        for backend in ("eager", "aot_eager", "inductor")
    },
    "export": exported,
    "no_grad": exported_without_gradients,
}


def leaf(module, suffix, dtype=torch.float32):
    return torch.randn(*(() if suffix else (4,)), 3, 5, dtype=dtype, requires_grad=True)


@every_suffix
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_outputs_changed_in_place(cell, way, suffix):
    """Backward reads y as it was. So a program may change the outputs, and so may its caller."""
    net = Changed(make(rnnfast, cell, 5, 17, suffix=suffix))
    x = leaf(net, suffix)
    run = WAYS[way](net, x.detach())
    grads = []
    for f in (run, net):
        out = f(x)
        if way != "inductor":  # it keeps one tensor for backward and the caller, and torch refuses
            out = [t.mul_(3) for t in out]
        grads.append(torch.autograd.grad(sum(t.square().sum() for t in out), x)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_batches_of_gradients(way):
    """With is_grads_batched, and a vectorized Jacobian."""
    module = rnnfast.LSTM(5, 7, 2, bidirectional=True, dtype=torch.float64)
    x = leaf(module, "", torch.float64)
    run = WAYS[way](module, x.detach())
    y = run(x)[0]
    rows = torch.randn(3, *y.shape, dtype=torch.float64)
    (got,) = torch.autograd.grad(y, x, rows, is_grads_batched=True, retain_graph=True)
    want = [torch.autograd.grad(y, x, row, retain_graph=True)[0] for row in rows]
    torch.testing.assert_close(got, torch.stack(want))
    got, want = (
        torch.autograd.functional.jacobian(lambda x, f=f: f(x)[0].sin(), x.detach(), vectorize=v)
        for f, v in ((run, True), (module, False))
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_saved_has_one_size_for_all_instruction_sets(cell, dtype):
    """A graph contains this size, and torch's caches may bring it to another processor."""
    for hidden in (1, 4, 7, 8, 9, 16, 17):
        module = make(rnnfast, cell, 5, hidden, 2, bidirectional=True, dtype=dtype)
        x, weights, sizes = torch.randn(4, 3, 5, dtype=dtype), list(module.parameters()), set()
        for isa in _C.supported_isas(str(dtype).removeprefix("torch.")):
            _C.force_isa(isa)
            saved = torch.ops.rnnfast.stack(
                x, None, None, weights, *(None,) * 2, *module._config(), None, True
            )[4]
            sizes.add(saved.numel())
        assert len(sizes) == 1


TRAINS = """
import sys, torch, rnnfast
from torch._dynamo.utils import counters
torch.manual_seed(0)
torch.set_num_threads(1)
module = rnnfast.LSTM(5, 5, 2, bidirectional=True)
x = torch.randn(4, 3, 5, requires_grad=True)
runs = []
for action, *path in (argument.split("=") for argument in sys.argv[1:]):
    if action == "compile":
        runs.append(torch.compile(module, fullgraph=True))
    elif action == "save":
        torch.export.save(torch.export.export(module, (x.detach(),)), *path)
    else:
        run = torch.export.load(*path).module()
        module.load_state_dict(run.state_dict())
        runs += [run, torch.compile(run, backend="aot_eager")]
for run in runs:
    got, want = (torch.autograd.grad(f(x)[0].square().sum(), x)[0] for f in (run, module))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
print(counters["inductor"]["fxgraph_cache_hit"])
"""


def test_another_instruction_set_than_that_of_the_cache(python, tmp_path):
    isas = _C.supported_isas()[:: len(_C.supported_isas()) - 1 or 1]
    hits = []
    for isa in isas[::-1]:
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "RNNFAST_ISA": isa}
        hits.append(int(python(["-c", TRAINS, "compile"], timeout=300, **cache).stdout))
    assert hits[0] == 0
    assert all(hits[1:])


def test_another_instruction_set_than_that_of_the_saved_program(python, tmp_path):
    first, second = _C.supported_isas()[0], _C.supported_isas()[-1]
    one, other = tmp_path / "one.pt2", tmp_path / "other.pt2"
    python(["-c", TRAINS, f"save={one}"], RNNFAST_ISA=first)
    python(["-c", TRAINS, f"load={one}", f"save={other}"], RNNFAST_ISA=second)
    python(["-c", TRAINS, f"load={other}"], RNNFAST_ISA=first)
