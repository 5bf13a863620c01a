"""What the package does to its process: OpenMP runtimes, threads, forks, torch's absence."""

from __future__ import annotations

import json

import pytest

from reference import CELLS
from rnnfast.stack import cuda_plans

BLOCK_TORCH = "import sys; sys.modules['torch'] = None\n"

RUNTIMES = """
import os, re
def runtimes():
    paths = {line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps") if "/" in line}
    return sorted(
        os.path.realpath(p) for p in paths
        if re.match(r"lib(gomp|i?omp\\d*)[-.]", os.path.basename(p))
    )
"""

TWO_THREADS = """
import numpy as np
x, h, w = np.ones((20, 33, 130), "f"), np.ones((33, 130), "f"), np.full((520, 130), 1e-2, "f")
import rnnfast.arrays
def lstm(threads):
    return rnnfast.arrays.forward("lstm", x, (w, w), (h, h), threads=threads).y
"""


@pytest.mark.parametrize(
    "start",
    ["import rnnfast, torch", "import torch, rnnfast", "import numpy, rnnfast", BLOCK_TORCH],
    ids=["rnnfast_first", "torch_first", "rnnfast_only", "no_torch"],
)
def test_one_openmp_runtime(python, start):
    code = f"{start}\n{RUNTIMES}{TWO_THREADS}"
    code += "lstm(2)\n"
    if start != BLOCK_TORCH:
        code += "import torch; torch.set_num_threads(2); torch.ones(2000, 2000).exp().sum()\n"
        code += "rnnfast.LSTM(130, 130)(torch.ones(20, 33, 130))[0].sum().backward()\n"
    code += "found = runtimes()\nassert len(found) == 1, found"
    python(code)


THREADS = """
import os
def threads():
    return len(os.listdir("/proc/self/task"))
"""


def test_arrays_use_the_threads_they_are_given(python):
    """Or the tests of test_invariance.py would compare one thread with itself."""
    code = f"""
{BLOCK_TORCH}{THREADS}{TWO_THREADS}
before = threads()
lstm(1)
assert threads() == before
lstm(2)
assert threads() == before + 1
"""
    python(code)


def test_modules_use_the_threads_of_torch(python):
    modules = [f"rnnfast.{cell.layer}(130, 130, **{dict(cell.options)!r})" for cell in CELLS.values()]
    code = f"""
import torch, rnnfast
{THREADS}
torch.set_num_threads(1)  # before torch starts threads to copy a weight
modules = [{", ".join(modules)}]
x = torch.randn(20, 33, 130)
before = threads()
for module in modules:
    module(x)[0].sum().backward()
    assert threads() == before, module
torch.set_num_threads(2)
with torch.no_grad():
    modules[0](x)
assert threads() == before + 1
"""
    python(code)


def test_a_forked_child_computes(python):
    """One thread before the fork, one thread after it."""
    code = """
import multiprocessing, torch, rnnfast
torch.set_num_threads(1)
torch.manual_seed(0)
modules = [rnnfast.LSTM(30, 40), rnnfast.GRU(30, 40), rnnfast.GRU(30, 40, reset_after=False)]
x = torch.randn(7, 5, 30)

def work(module):
    y, _ = module(x)
    y.sum().backward()
    return y.detach().numpy(), module.weight_hh_l0.grad.numpy()

def child(queue):
    torch.set_num_threads(1)
    queue.put([work(module) for module in modules])

want = [work(module) for module in modules]
for module in modules:
    module.zero_grad()
context = multiprocessing.get_context("fork")
queue = context.Queue()
process = context.Process(target=child, args=(queue,))
process.start()
got = queue.get(timeout=60)
process.join(60)
assert process.exitcode == 0, process.exitcode
for a, b in zip(want, got):
    assert (a[0] == b[0]).all() and (a[1] == b[1]).all()
"""
    python(code)


def test_a_fork_after_two_threads(python):
    """torch.nn hangs there: OpenMP's second thread is not in the child."""
    code = f"""
{BLOCK_TORCH}{TWO_THREADS}
import os
want = lstm(2)
child = os.fork()
if child == 0:
    os._exit(0 if all((lstm(n) == want).all() for n in (2, 1, 3, 2)) else 3)
assert os.waitpid(child, 0)[1] == 0
assert (lstm(2) == want).all()
"""
    python(code)


def test_a_fork_after_the_import_alone(python):
    code = f"""
{BLOCK_TORCH}{TWO_THREADS}
import os
child = os.fork()
if child == 0:
    os._exit(0 if np.isfinite(lstm(1)).all() else 3)
assert os.waitpid(child, 0)[1] == 0
"""
    python(code)


def test_memory_is_given_back(python):
    """Calls that succeed and calls that raise: nothing is kept of either."""
    code = """
import gc, os, weakref
import numpy as np, torch, rnnfast
torch.set_num_threads(1)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def forward(x, w_ih, w_hh, b_ih, h0):
    return rnnfast.arrays.forward("gru", x, (w_ih, w_hh, b_ih), h0, save=True)

def call():
    module = rnnfast.LSTM(64, 64, 2, bidirectional=True)
    module(torch.randn(10, 8, 64))[0].sum().backward()
    a = {name: np.zeros(shape, "f") for name, shape in shapes.items()}
    forward(**a).backward(a["x"])

shapes = dict(x=(10, 8, 64), w_ih=(192, 64), w_hh=(192, 64), b_ih=(192,), h0=(8, 64))
for _ in range(20):
    call()
before = resident()
for _ in range(200):
    call()
assert resident() - before < 2**23, resident() - before  # one result each would be 2^27

for name in shapes:
    for shape, dtype in (((2,) * 9, "f"), ((3,), "f"), ((5, 5), "i")):
        a = {other: np.zeros(shapes[other], "f") for other in shapes}
        a[name] = np.zeros(shape, dtype)
        kept = [weakref.ref(value) for value in a.values()]
        try:
            forward(**a)
        except (ValueError, TypeError):
            pass
        else:
            raise AssertionError(name)
        del a
        gc.collect()
        assert not [ref for ref in kept if ref() is not None], name
"""
    python(code)


def test_without_torch(python):
    """The arrays work, with the same bits; the classes name the cure."""
    code = f"""
{TWO_THREADS}
import hashlib, sys
print(hashlib.sha256(lstm(2).tobytes()).hexdigest())
"""
    alone = python(BLOCK_TORCH + code)
    assert alone.stdout == python("import torch\n" + code).stdout
    names = ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell", "accelerate", "restore"]
    names += ["init", "onnx"]
    code = f"""
{BLOCK_TORCH}
import json, rnnfast
messages = dict()
for name in {names}:
    try:
        getattr(rnnfast, name)
    except ImportError as error:
        messages[name] = str(error)
print(json.dumps(messages))
"""
    messages = json.loads(python(code).stdout)
    assert list(messages) == names
    for name, message in messages.items():
        assert f"rnnfast.{name}" in message
        assert 'pip install "rnnfast[torch]"' in message


def test_a_broken_torch_is_not_a_missing_one(python, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudnn.so.9: cannot open')")
    said = python(
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport rnnfast\nrnnfast.LSTM", check=False
    ).stderr
    assert said.rstrip().endswith("ImportError: libcudnn.so.9: cannot open")


def test_an_unknown_attribute_is_not_an_import_error(python):
    for start in ("", BLOCK_TORCH):
        python(start + "import rnnfast\nassert not hasattr(rnnfast, 'LTSM')")


def test_public_names(python):
    """They are listed before they are loaded, at the first use."""
    python(
        "import rnnfast\n"
        "assert set(rnnfast.__all__) <= set(dir(rnnfast))\n"
        "for name in rnnfast.__all__:\n"
        "    getattr(rnnfast, name)\n"
    )


TRAINS = """
import sys
import torch, rnnfast
module = rnnfast.GRU(3, 4)
module(torch.randn(2, 2, 3))[0].sum().backward()
assert "torch._dynamo" not in sys.modules
"""


def test_a_training_does_not_wait_for_the_import_of_dynamo(python):
    """It takes a second."""
    python(TRAINS)


def test_dynamo_knows_what_is_constant_for_it():
    import torch._dynamo  # noqa: F401

    assert cuda_plans._takes._dynamo_marked_constant
