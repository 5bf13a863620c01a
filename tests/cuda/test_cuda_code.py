"""The CUDA kernels as nvcc compiles them, for every architecture: what a device would execute."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import cuda_code
import sass
from cmakes import CMAKE, ROOT, configure
from cuda_code import CLASSES, NUMBERS

ARCHITECTURES = ["sm_100", "sm_120", "sm_80", "sm_90"]
TENSOR_CORES = {numbers for (_, engine), numbers in NUMBERS.items() if engine == "TensorCores"}
KERNELS = {
    (architecture, numbers, cell, kernel)
    for architecture in ARCHITECTURES
    for numbers in NUMBERS.values()
    for cell in CLASSES
    for kernel in ("forward", "backward")
}
GROWTH = 1.05  # of a number of instructions since it was recorded

pytestmark = pytest.mark.xdist_group("cuda_code")  # one worker compiles the kernels for all tests


# A time loop as nvdisasm prints it: a loop over elements, two pairs of HMMA, and a meeting.
LISTING = """
	.section	.text._ZN7rnnfast4cuda14forward_kernelINS0_4LstmENS_8Bfloat16EEEv,"ax",@progbits
        /*0000*/                   MEMBAR.ALL.GPU ;
        /*0010*/                   BSSY B0, `(.L_x_2) ;
.L_x_0:
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_1:
        /*0030*/                   LDG.E.U16 R0, desc[UR6][R2.64] ;
        /*0040*/              @!P0 BRA `(.L_x_6) ;
        /*0050*/                   MUFU.TANH R0, R0 ;
.L_x_6:
        /*0060*/                   STG.E.U16 desc[UR6][R2.64], R0 ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/                   WARPSYNC.ALL ;
        /*0090*/                   HMMA.16816.F32.BF16 R188, R180, R188, RZ ;
        /*00a0*/                   HMMA.16816.F32.BF16 R184, R176, R184, RZ ;
        /*00b0*/              @!P2 BRA `(.L_x_3) ;
        /*00c0*/                   FADD R0, R188, R184 ;
        /*00d0*/                   FADD R1, R189, R185 ;
.L_x_3:
        /*00e0*/                   WARPSYNC.ALL ;
        /*00f0*/                   HMMA.16816.F32.BF16 R188, R172, R210, R188 ;
        /*0100*/                   HMMA.16816.F32.BF16 R184, R168, R208, R184 ;
        /*0110*/                   MEMBAR.ALL.GPU ;
.L_x_4:
        /*0120*/                   LDG.E.STRONG.GPU R0, desc[UR6][R4.64] ;
        /*0130*/              @!P3 BRA `(.L_x_4) ;
        /*0140*/               @P4 BRA `(.L_x_0) ;
        /*0150*/                   BSYNC B0 ;
.L_x_2:
        /*0160*/                   EXIT ;
.L_x_5:
        /*0170*/                   BRA `(.L_x_5);
"""


def line_of(address: str) -> str:
    return next(line for line in LISTING.splitlines() if f"/*{address}*/" in line)


@pytest.mark.parametrize(
    ("moved", "below", "changes"),
    [
        (None, None, {}),
        ("0110", "0120", {"fences": (1, 0, 1)}),  # a fence in the loop that waits
        ("0000", "0020", {"fences": (0, 2, 0), "step": 20}),
        ("00e0", "0100", {"unsynced": 2, "pair": 2}),  # between the pair and the fence
        ("00e0", "00b0", {"unsynced": 2, "pair": 2}),  # on one of two ways
        ("00c0", "00e0", {"pair": 4}),
        ("0050", "0150", {"element": 4, "step": 18}),
    ],
)
def test_what_is_read_in_machine_code(moved, below, changes):
    text = LISTING
    if moved:
        text = text.replace(line_of(moved) + "\n", "")
        text = text.replace(line_of(below), line_of(below) + "\n" + line_of(moved))
    (kernel,) = sass.kernels(text)
    expected = {"step": 19, "element": 5, "pair": 3, "local": 0, "multiplies": 4, "unsynced": 0}
    assert cuda_code.measure(kernel)._asdict() == {**expected, "fences": (1, 1, 0), **changes}


def test_local_memory_is_seen():
    (kernel,) = sass.kernels(LISTING.replace("MUFU.TANH R0, R0", "LDL.64 R0, [R1]"))
    assert cuda_code.measure(kernel).local == 1


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The module _cuda as it is built by default, and what the compiler said of its kernels."""
    if CMAKE is None or shutil.which("nvcc") is None:
        pytest.skip("no nvcc to compile with")
    folder = tmp_path_factory.mktemp("cuda")
    found = configure(folder, "-DRNNFAST_CUDA=ON", "-DCMAKE_CUDA_FLAGS=-Xptxas -v")
    assert found.returncode == 0, found.stdout + found.stderr
    command = [CMAKE, "--build", folder, "--target", "_cuda", "--parallel", "2"]
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    (library,) = folder.glob("_cuda.*.so")
    return library, build.stdout + build.stderr


@pytest.fixture(scope="module")
def library(built):
    if cuda_code.tool("cuobjdump") is None or cuda_code.tool("nvdisasm") is None:
        pytest.skip("no cuobjdump or nvdisasm to read machine code with")
    return built[0]


@pytest.fixture(scope="module")
def code(library):
    return dict(cuda_code.code(library))


@pytest.mark.slow
def test_compiler_keeps_all_in_registers(built):
    """Each cell, forward and backward, with five kinds of numbers, on four architectures."""
    _, said = built
    names = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", said)
    assert len(names) == len(set(names)) == len(KERNELS)
    assert sorted({architecture for _, architecture in names}) == ARCHITECTURES
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    assert len(registers) == len(names)
    assert max(registers) <= 255
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said
    )
    assert len(frames) == len(names)
    assert set(frames) == {("0", "0", "0")}


@pytest.mark.slow
def test_module_has_code_for_every_architecture(library):
    """Devices of these architectures compile nothing at first use. Others compile PTX."""
    assert cuda_code.architectures(library, "elf") == set(ARCHITECTURES)
    assert cuda_code.architectures(library, "ptx") == {"sm_100"}


@pytest.mark.slow
def test_module_loads_where_there_is_no_device(built, python):
    """Its runtime is inside, and neither libtorch nor cuDNN is linked."""
    library, _ = built
    load = f"import cuda_on_cpu; m = cuda_on_cpu.load({str(library)!r}); "
    ask = load + "m.plan(0, -1, 'float32', False, False, (8, 2, 1), None)"
    assert "not in the table of 6 cells" in python(ask, check=False).stderr
    needed = subprocess.run(["objdump", "-p", library], check=True, capture_output=True, text=True)
    linked = re.findall(r"NEEDED +(\S+)", needed.stdout)
    assert linked
    assert not [n for n in linked if re.match(r"lib(torch|c10|cuda|cudnn|cublas)", n)]
    if not Path("/dev/nvidiactl").exists():
        refused = python(load + "m.device(0)", check=False)
        assert refused.returncode == 1
        assert "RefusedError: asking for the properties of the device" in refused.stderr


@pytest.mark.slow
def test_no_local_memory(code):
    assert set(code) == KERNELS
    assert {name for name, found in code.items() if found.local} == set()


@pytest.mark.slow
def test_products_are_on_tensor_cores_and_behind_warpsync(code):
    """The lanes of a warp execute an HMMA together; after a branch only WARPSYNC makes them."""
    for name, found in code.items():
        assert found.multiplies == (40 if name.numbers in TENSOR_CORES else 0), name
        assert found.unsynced == 0, name


@pytest.mark.slow
def test_memory_barriers_are_only_those_of_meetings(code):
    """A memory barrier waits for all stores of a thread.

    A meeting of blocks needs one: other blocks read what this one stored. A step has a meeting for each
    stage, by clusters or in a grid, and a kernel has code for both; devices before sm_90 know no
    clusters. So there is one of each in the time loop, and none in the loops inside, also not in the
    loop that waits. The other meetings are before the first step.
    """
    for name, found in code.items():
        kinds = 1 if name.architecture == "sm_80" else 2
        stages = CLASSES[name.cell].stages
        before = 2 if name.kernel == "forward" else 1
        assert found.fences == (before * kinds, stages * kinds, 0), name


@pytest.mark.slow
def test_instructions_have_not_become_more(code):
    nvcc, recorded = cuda_code.recorded()
    if nvcc != cuda_code.release():
        pytest.skip(f"recorded for nvcc {nvcc}; this is {cuda_code.release()}")
    assert set(recorded) == KERNELS
    grown = []
    for name, found in code.items():
        for kind, before in zip(("step", "element", "pair"), recorded[name], strict=True):
            now = getattr(found, kind)
            assert (now is None) == (before is None), name
            if now is not None and now > GROWTH * before:
                grown.append(f"{' '.join(name)}: {kind} has {now} instructions; recorded: {before}")
    assert not grown, "\n".join([*grown, "tests/support/cuda_code.py records them anew"])


def test_statements_of_a_whole_warp_are_volatile():
    """The compiler may move another asm statement below a condition, where some lanes do not go."""
    text = (ROOT / "csrc/cuda/device.h").read_text()
    statements = re.findall(r"asm( volatile)?\(\s*((?:\"[^\"]*\"\s*)+)", text)
    assert len(statements) == text.count("asm(") + text.count("asm volatile(")
    together = [volatile for volatile, code in statements if ".aligned" in code or ".sync" in code]
    assert together == [" volatile"] * 4  # mma for three kinds of numbers, and the cluster's barrier
