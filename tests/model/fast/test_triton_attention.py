"""Triton deformable attention: selection; runs triton_cases.py in the interpreter and on CUDA; compiles the kernels."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from motip.errors import MotipError
from motip.model import deformable_attention
from motip.model.deformable_attention import DeformableAttention
from motip.model.fast import triton_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

needs_triton = pytest.mark.skipif(
    not triton_attention._INSTALLED, reason="triton is not installed (it has no macOS wheels)"
)


def _python(root: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a separate process: triton chooses compiler or interpreter when it is imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_", "MOTIP_"))}
    return subprocess.run(
        [sys.executable, *arguments], cwd=root, env={**kept, **variables}, capture_output=True, text=True
    )


def _passed(result: subprocess.CompletedProcess[str]) -> int:
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return int(re.findall(r"(\d+) passed", result.stdout)[-1])


@needs_triton
@pytest.mark.timeout(1200)
def test_cases_in_the_interpreter(repo_root: Path) -> None:
    cases = ("-m", "pytest", "tests/model/fast/triton_cases.py", "-o", "addopts=", "-p", "no:cacheprovider")
    assert _passed(_python(repo_root, *cases, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")) >= 25


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.timeout(1200)
def test_cases_on_cuda(repo_root: Path) -> None:
    cases = ("-m", "pytest", "tests/model/fast/triton_cases.py", "-o", "addopts=", "-p", "no:cacheprovider")
    assert _passed(_python(repo_root, *cases)) >= 25


_COMPILE = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from motip.model.fast import triton_kernels

def machine_code(kernel, **flags):
    constants = dict(HEADS=8, CHANNELS=32, LEVELS=4, POINTS=4, ACC=tl.float32, ROWS=16, WIDTH=32, **flags)
    types = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(("rows", "queries", "pixels"), "i32")
    types |= {"value": "*bf16", "levels": "*i32"} | dict.fromkeys(constants, "constexpr")
    indices = {name: index for index, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in kernel.arg_names},
        constexprs={(indices[name],): value for name, value in constants.items()},
    )
    return len(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 2}).asm["cubin"])

print(machine_code(triton_kernels._forward_kernel))
print(machine_code(triton_kernels._backward_kernel, NEEDS_VALUE=True, NEEDS_LOCATIONS=True, NEEDS_WEIGHTS=True))
"""


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="triton's assembler is for Linux only")
@pytest.mark.timeout(1200)
def test_kernels_compile_to_machine_code_without_a_gpu(repo_root: Path, tmp_path: Path) -> None:
    """The interpreter accepts Python code that the compiler rejects."""
    result = _python(repo_root, "-c", _COMPILE, TRITON_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr[-6000:]
    assert all(int(size) > 1000 for size in result.stdout.split()) and len(result.stdout.split()) == 2


def test_preferred_implementation_per_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "_ready", True)
    assert deformable_attention.best_implementation(CPU) == "embedding_bag"
    assert deformable_attention.best_implementation(torch.device("meta")) == "grid_sample"
    assert deformable_attention.best_implementation(CUDA) == "triton"
    torch.use_deterministic_algorithms(True)
    try:
        assert deformable_attention.best_implementation(CUDA) == "embedding_bag"
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(triton_attention, "_ready", False)
    assert deformable_attention.best_implementation(CUDA) == "grid_sample"


def test_cpu_tensors_do_not_use_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deformable_attention, "_chosen", "auto")
    implementations = {**deformable_attention._implementations, "triton": _never}
    monkeypatch.setattr(deformable_attention, "_implementations", implementations)
    module = DeformableAttention(16, 1, 2, 1)
    out = module(torch.randn(1, 3, 16), torch.rand(1, 3, 1, 2), torch.randn(1, 6, 16), [(2, 3)])
    assert out.shape == (1, 3, 16)


def _never(*_: object) -> torch.Tensor:
    raise AssertionError("Triton was used on a CPU")


def test_unusable_triton_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Simulated on a CPU: the test launch fails as it does without a C compiler."""

    class NoCompiler:
        @staticmethod
        def forward(*_: object) -> torch.Tensor:
            raise RuntimeError("Failed to find C compiler.\n Please specify one")

    monkeypatch.setattr(triton_attention, "_ready", None)
    monkeypatch.setattr(triton_attention, "_kernels", NoCompiler)
    with caplog.at_level(logging.WARNING, logger=triton_attention.__name__):
        assert [triton_attention.triton_ready(CPU), triton_attention.triton_ready(CPU)] == [False, False]
    assert len(caplog.records) == 1
    assert "Failed to find C compiler. Please specify one" in caplog.text and "grid_sample" in caplog.text


def test_out_of_memory_in_the_test_launch_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(triton_attention, "_ready", None)
    monkeypatch.setattr(triton_attention, "_kernels", full)
    with pytest.raises(torch.OutOfMemoryError):
        triton_attention.triton_ready(CPU)
    assert triton_attention._ready is None


@needs_triton
def test_cpu_tensors_are_an_error() -> None:
    value, locations, weights = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 1)
    with pytest.raises(MotipError, match="run on a CUDA device"):
        triton_attention.triton_attention(value, [(1, 1)], locations, weights)


def test_fallback_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "_INSTALLED", False)
    monkeypatch.setattr(triton_attention, "_ready", None)
    assert deformable_attention.best_implementation(CPU) == "embedding_bag"
    assert not triton_attention.triton_ready(CPU)
    with pytest.raises(MotipError, match="need triton"):
        triton_attention._kernels()


def test_model_runs_without_an_importable_triton(repo_root: Path) -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, motip.model; from motip.model.deformable_attention import DeformableAttention\n"
        "layer = DeformableAttention(16, 1, 2, 1)\n"
        "print(layer(torch.randn(1, 3, 16), torch.rand(1, 3, 1, 2), torch.randn(1, 6, 16), [(2, 3)]).shape[1])\n"
        "from motip.model.fast.triton_attention import triton_attention\n"
        "triton_attention(torch.ones(1, 1, 1, 1), [(1, 1)], torch.ones(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1))"
    )
    result = _python(repo_root, "-c", code)
    assert result.stdout.strip() == "3"
    assert "need triton" in result.stderr and "MOTIP_DEFORMABLE_ATTENTION=grid_sample" in result.stderr


def test_environment_variable_selects_the_implementation(repo_root: Path) -> None:
    code = "from motip.model.deformable_attention import log_implementation; print(log_implementation())"
    assert _python(repo_root, "-c", code, MOTIP_DEFORMABLE_ATTENTION="grid_sample").stdout.strip() == "grid_sample"
    wrong = _python(repo_root, "-c", code, MOTIP_DEFORMABLE_ATTENTION="cuda-magic")
    assert wrong.returncode != 0
    assert "MOTIP_DEFORMABLE_ATTENTION" in wrong.stderr and "embedding_bag, grid_sample, triton" in wrong.stderr


def test_fake_tensors_need_no_kernel() -> None:
    """The memory estimate runs on fake tensors."""
    with FakeTensorMode():
        value = torch.empty(2, 6, 2, 8, dtype=torch.bfloat16, requires_grad=True)
        locations = torch.empty(2, 3, 2, 1, 4, 2, requires_grad=True)
        weights = torch.empty(2, 3, 2, 1, 4)
        out = triton_attention.triton_attention(value, [(2, 3)], locations, weights)
        assert (out.shape, out.dtype) == ((2, 3, 16), torch.bfloat16)
        grads = torch.autograd.grad(out.sum(), (value, locations))
    assert [(grad.shape, grad.dtype) for grad in grads] == [
        (value.shape, torch.bfloat16),
        (locations.shape, torch.float32),
    ]
