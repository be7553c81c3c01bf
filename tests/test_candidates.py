"""The check of a candidate kernel: each thing that it may leave out is a case with a name."""

import re

import pytest
import torch

from benchmarks import candidates
from benchmarks.candidates import CandidateError, candidate_cases, candidate_fault, check_candidate
from lora_core.errors import UserError
from lora_core.kernels import OPS
from lora_core.plugins import load_from_file
from tests.conftest import TINY_LAYER

HEAD = """
import torch
from lora_core.kernels import reference

def fn(x, weight, bias, down, up, scale, magnitude=None, norm=None, drop=None):
    {line}
    return reference.lora_linear(x, weight, bias, down, up, scale, magnitude, norm, drop)
"""
MISTAKES = {
    "drop = None": {"dropout", "dropout of x with 2 dimensions", "dropout and DoRA"},
    "magnitude = None": {"DoRA", "DoRA without bias", "dropout and DoRA"},
    "norm = None if norm is None else norm.detach()": {"DoRA with its norm in the graph"},
    "bias.shape": {"LoRA without bias", "DoRA without bias", "LoRA without weight"},
    "weight.shape": {"LoRA without weight", "dropout without weight"},
    "b, s, i = x.shape": {"x with 2 dimensions", "x with 4 dimensions", "one row"},
    "x = x.view(-1, x.shape[-1]).view(x.shape)": {"x transposed in memory"},
    "assert x.is_contiguous()": {"x transposed in memory", "x sliced out of a wider tensor"},
    "assert up.is_contiguous()": {"down and up transposed in memory"},
    "assert len(down) % 4 == 1": {"rank 3"},
    "assert x.requires_grad": {"x without gradient"},
    "x = x.detach()": {"LoRA", "rank 1"},
    "up = up.to(x.dtype).to(up.dtype).detach()": {"LoRA"},
    "x.data.mul_(1.5)": {"LoRA"},
}


def load(tmp_path, line):
    scope = {}
    exec(compile(HEAD.format(line=line), str(tmp_path / "mine.py"), "exec"), scope)
    return scope["fn"]


@pytest.mark.parametrize("line", MISTAKES)
def test_what_a_candidate_leaves_out_is_named(tmp_path, line):
    """In fp32; some of these mistakes are in further cases, too."""
    function = load(tmp_path, line)
    failing = set()
    for case in candidate_cases("lora_linear", "cpu", torch.float32):
        if candidate_fault("lora_linear", function, case):
            failing.add(case.name)
    assert MISTAKES[line] <= failing, failing
    if line == "drop = None":
        assert all("dropout" in name for name in failing)


@pytest.mark.parametrize("op", ["lora_linear", "lora_grouped", "snr_weighted_mse"])
def test_the_fused_implementation_is_a_right_candidate(op):
    said = check_candidate(op, OPS[op].fused, (), only_plain=False)
    assert re.fullmatch(rf"candidate: \d+ cases of {op} agree .*\(fp32, bf16, fp16\)", said)


def test_a_result_in_another_dtype_and_an_argument_that_changes_are_refused(tmp_path):
    case = candidate_cases("lora_linear", "cpu", torch.bfloat16)[0]

    def wide(*args):
        return OPS["lora_linear"].reference(*args).float()

    said = candidate_fault("lora_linear", wide, case)
    assert said == "gives result in float32, expected bfloat16"

    def writing(x, *args):
        y = OPS["lora_linear"].reference(x.clone(), *args)
        x.data.add_(1)
        return y

    assert candidate_fault("lora_linear", writing, case) == (
        "gives x after, where the reference has none"
    )


PLAIN = """
from lora_core.kernels import reference

def first(x, weight, bias, down, up, scale):
    return reference.lora_linear(x, weight, bias, down, up, scale)

def halves(x, weight, bias, down, up, scale, *rest):
    return reference.lora_linear(x, weight, bias, down, up, scale, *rest)

halves.supports = lambda x, *rest: "it takes fp32 only" if x.element_size() < 4 else None

def none(*args):
    raise RuntimeError("called")

none.supports = lambda *args: "nothing is taken"
"""


def test_a_first_kernel_need_not_know_dora_and_dropout(kernels_benchmark, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(PLAIN)
    status, out, err = kernels_benchmark(*TINY_LAYER, "--candidate", f"{file}:first")
    lines = err.splitlines()
    assert status == 1 and len(lines) == 9, err
    assert all("DoRA" in line or "dropout" in line for line in lines)
    assert "8 cases fail; make it equal" in lines[-1] and "--case lora" in lines[-1]
    assert "forward ms" not in out  # nothing is timed
    with pytest.raises(CandidateError) as refused:
        check_candidate("lora_linear", lambda x, *rest: x, (), only_plain=True)
    assert "make it equal" in str(refused.value) and "--case lora" not in str(refused.value)
    plain = ["--case", "lora", "--candidate"]
    status, out, err = kernels_benchmark(*TINY_LAYER, *plain, f"{file}:first")
    assert status == 0, err
    assert "candidate: 45 cases of lora_linear agree with the reference" in out
    assert "\ncandidate " in out and "lora_linear DoRA" not in out
    assert "--case lora: DoRA and dropout were neither checked nor timed" in out


def test_what_a_candidate_does_not_support_is_not_checked_and_said(tmp_path, monkeypatch):
    scope = {}
    exec(PLAIN, scope)
    said = check_candidate("lora_linear", scope["halves"], (), only_plain=True).splitlines()
    assert said[0].startswith("candidate: 15 cases")
    assert said[1] == "not checked: DoRA and dropout (--case lora)"
    assert said[2].startswith("not checked, because unsupported (it takes fp32 only): LoRA bf16, ")
    with pytest.raises(CandidateError, match=r"supports no case of lora_linear \(nothing is taken"):
        check_candidate("lora_linear", scope["none"], (), only_plain=False)


def test_options_of_the_check_that_do_not_fit_are_refused(kernels_benchmark):
    status, _, err = kernels_benchmark(*TINY_LAYER, "--op", "dora_norm", "--case", "lora")
    assert status == 2 and "--case lora is for the ops lora_linear and lora_grouped" in err
    with pytest.raises(UserError, match="cannot be checked as adamw_step"):
        candidates.example_checks("adamw_step", "cpu", torch.float32)


TRITON = """
import torch
import triton
import triton.language as tl

@triton.jit
def product(a, b, c, m, n, k, sa, ta, sb, tb, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, k, BLOCK):
        inner = start + tl.arange(0, BLOCK)
        left_in = (rows[:, None] < m) & (inner[None, :] < k)
        left = tl.load(a + rows[:, None] * sa + inner[None, :] * ta, left_in, 0.0)
        right_in = (inner[:, None] < k) & (columns[None, :] < n)
        right = tl.load(b + inner[:, None] * sb + columns[None, :] * tb, right_in, 0.0)
        total += tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(c + rows[:, None] * n + columns[None, :], total, inside)

def multiply(a, b):
    (m, k), n = a.shape, b.shape[1]
    c = torch.empty(m, n, device=a.device)
    grid = triton.cdiv(m, 64), triton.cdiv(n, 64)
    product[grid](a, b, c, m, n, k, *a.stride(), *b.stride(), BLOCK=64)
    return c

class Layer(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, down, up, scale):
        rows = x.reshape(-1, x.shape[-1])
        y = scale * multiply(multiply(rows, down.T), up.T)
        y = y if weight is None else y + multiply(rows, weight.T)
        y = y if bias is None else y + bias
        return y.to(x.dtype).view(*x.shape[:-1], len(up))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2], *inputs[3:5])
        ctx.scale = inputs[5]

    @staticmethod
    def backward(ctx, dy):
        x, weight, down, up = ctx.saved_tensors
        rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        hidden, back = multiply(rows, down.T), ctx.scale * multiply(dy, up)
        dx = multiply(back, down)
        dx = dx if weight is None else dx + multiply(dy, weight)
        d_up = ctx.scale * multiply(dy.T, hidden)
        return dx.to(x.dtype).view(x.shape), None, None, multiply(back.T, rows), d_up, None

def lora_linear(x, weight, bias, down, up, scale):
    return Layer.apply(x, weight, bias, down, up, scale)
"""


def test_a_triton_kernel_of_ones_own_is_checked_in_the_interpreter(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    few = ("LoRA without weight", "x with 2 dimensions", "x sliced out of a wider tensor")
    chosen = {name: candidates.LINEAR_CASES[name] for name in few}
    monkeypatch.setattr(candidates, "LINEAR_CASES", chosen)
    monkeypatch.setattr(candidates, "CHECKED_DTYPES", {"bf16": torch.bfloat16})
    (tmp_path / "mine.py").write_text(TRITON)
    function = load_from_file(str(tmp_path / "mine.py"), "lora_linear", "function")
    said = check_candidate("lora_linear", function, (), only_plain=True)
    assert said.startswith("candidate: 3 cases of lora_linear agree with the reference")
