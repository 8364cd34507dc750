"""The cases under pytest-benchmark: `pytest benchmarks/test_kernels.py --benchmark-only`."""

import pytest
import torch

from orwcfm_fast.benchmarks.cases import OPS, cases
from orwcfm_fast.benchmarks.kernels import check

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("implementation", ["eager", "ours"])
@pytest.mark.parametrize("case", list(cases(DEVICE, short=True)), ids=str)
def test_forward(case, implementation, benchmark):
    inputs, op = case.inputs(DEVICE), OPS[case.op]
    assert check(case, inputs), "no figure for a wrong result"

    def call():
        op.ours(*[inputs[name] for name in op.names]) if implementation == "ours" else op.eager(**inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(call)
