import json

import pytest
import torch

from orwcfm_fast.benchmarks import cases as listed
from orwcfm_fast.benchmarks import kernels as bench


@pytest.fixture
def quick(monkeypatch):
    """Digit batches alone, a few calls each."""
    digits = [listed.Case(op, "fp32", listed.DIGITS) for op in listed.OPS]
    monkeypatch.setattr(bench, "cases", lambda device, short: digits)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(bench, "seconds_of", lambda function, device: function() is None or 1e-3)
    return lambda: bench.run(compiled=False, training_step=False)


def test_run_gives_time_and_error_against_float64(quick, tmp_path):
    result = json.loads(bench.save(quick(), tmp_path).read_text())
    ours = [row for row in result["rows"] if row["implementation"] == "ours"]
    assert {row["passes"] for row in ours} == {"forward", "forward+backward"}
    assert all(row["correct"] and row["seconds"] > 0 and row["error"] < 1e-6 for row in ours)
    assert all(len(bench.cells(row)) == len(bench.COLUMNS) for row in ours)
    assert list(tmp_path.glob("*.png"))


def test_no_speed_for_an_op_that_is_wrong(quick, monkeypatch):
    op = listed.OPS["anchored_residual"]

    def wrong(*args):
        loss, fm, w2, dv = op.reference(*args)
        return loss, fm, w2, dv * 1.001

    monkeypatch.setitem(listed.OPS, "anchored_residual", op._replace(ours=wrong))
    rows = [row for row in quick()["rows"] if row["implementation"] == "ours"]
    for row in rows:
        named = row["op"] == "anchored_residual"
        assert row["correct"] != named and (row["seconds"] is None) == named
        assert ("wrong result" in bench.cells(row)) == named


@pytest.mark.parametrize(("dtype", "floor"), [("fp32", 16), ("bf16", 8), ("fp16", 8), ("bf16, x1 fp32", 10)])
def test_floor_is_one_pass(dtype, floor):
    assert listed.Case("anchored_residual", dtype, (2, 5)).floor_bytes == 10 * floor
    assert listed.Case("interpolate", "bf16", (2, 5)).floor_bytes == 40


def test_eager_and_op_agree_on_the_gradient():
    case = listed.Case("anchored_residual", "fp32", (4, 3, 5))
    inputs = case.inputs("cpu")
    v = inputs["v"].requires_grad_()
    listed.eager_loss(**inputs).sum().backward()
    args = [inputs[name].detach() for name in listed.OPS[case.op].names]
    torch.testing.assert_close(v.grad, listed.OPS[case.op].ours(*args)[3])
