"""Instruction sets: which there are, and what happens when one is forced."""

from __future__ import annotations

import platform

import pytest
import torch

import rnnfast
from rnnfast import _C
from rnnfast.stack import packed_weights

OTHER_MACHINES = "neon" if platform.machine() in ("x86_64", "AMD64") else "avx512"
REFUSED = ["sse9", OTHER_MACHINES, "AVX2 "]
every_isa = pytest.mark.parametrize("name", _C.supported_isas())


@every_isa
def test_forced_by_the_environment(python, name):
    code = "from rnnfast import _C; print(_C.isa()); _C.force_isa(''); print(_C.isa())"
    assert python(code, RNNFAST_ISA=name).stdout.split() == [name, name]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_the_environment(python, name):
    """What is not known, or not here, is named in the error, together with what is here."""
    process = python("from rnnfast import _C", check=False, RNNFAST_ISA=name)
    assert process.returncode == 1  # an exception, not a signal
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError")
    assert f"RNNFAST_ISA={name} is not an instruction set" in last
    for supported in _C.supported_isas():
        assert supported in last


def test_an_empty_variable_is_none(python):
    """`RNNFAST_ISA= command` in a shell means what it means for an unset variable."""
    code = "from rnnfast import _C; print(_C.isa())"
    assert python(code, RNNFAST_ISA="").stdout.strip() == _C.supported_isas()[-1]


@pytest.mark.numerics
def test_marked_tests_run_in_the_instruction_set_of_their_name(request, isa):
    assert _C.isa() == isa
    assert isa in request.node.name


def test_other_tests_run_in_the_first_one(python):
    code = "from rnnfast import _C; print(_C.isa())"
    assert _C.isa() == python(code).stdout.strip()


@every_isa
def test_forced(name):
    _C.force_isa(name)
    assert _C.isa() == name
    _C.force_isa("")
    assert _C.isa() in _C.supported_isas()


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    before = _C.isa()
    with pytest.raises(ValueError, match=f"{name} is not an instruction set .*supported here"):
        _C.force_isa(name)
    assert _C.isa() == before


def test_each_has_its_own_bits():
    """Forcing does something: sums of another width round otherwise."""
    module, x = rnnfast.LSTM(33, 65), torch.randn(7, 3, 33)
    results = {}
    for name in ("baseline", _C.supported_isas()[-1]):
        _C.force_isa(name)
        results[name] = module(x)[0]
    if len(results) == 1:
        pytest.skip("one instruction set alone")
    first, second = results.values()
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("autocast", [False, True])
def test_packed_weights_are_of_one_instruction_set(autocast):
    """The blocks of another have another width: to read them would be to read past their end."""
    module, x = rnnfast.GRU(33, 65), torch.randn(1, 1, 33)
    with (
        torch.no_grad(),
        rnnfast.frozen(module),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        held = packed_weights.HELD[module]
        for name in _C.supported_isas():
            _C.force_isa(name)
            got = module(x)[0]
            if autocast:
                assert held.converted.copy.packed.is_of(held.converted.weights)
            else:
                assert held.copy.packed.is_of(list(module.parameters()))
            kept = held.copy, held.converted
            held.copy = held.converted = None
            assert torch.equal(got, module(x)[0])
            held.copy, held.converted = kept
