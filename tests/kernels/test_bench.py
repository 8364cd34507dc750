import json
import time

import pytest
import torch

from orwcfm_fast.benchmarks import cases as listed
from orwcfm_fast.benchmarks import clock
from orwcfm_fast.benchmarks import kernels as bench
from orwcfm_fast.benchmarks.record import save


@pytest.fixture
def quick(monkeypatch):
    """Digit batches alone, a few calls each."""
    digits = [listed.Case(op, "fp32", listed.DIGITS) for op in listed.OPS]
    monkeypatch.setattr(bench, "cases", lambda device, short: digits)
    monkeypatch.setattr(
        bench, "seconds_in_turn", lambda calls, device: [call() is None or 1e-3 for call in calls]
    )
    return lambda: bench.run(compiled=False, training_step=False)


def test_run_gives_time_and_error_against_float64(quick, tmp_path):
    result = json.loads(save(quick(), tmp_path, bench.plot).read_text())
    ours = [row for row in result["rows"] if row["implementation"] == "ours"]
    assert {row["passes"] for row in ours} == {"forward", "forward+backward"}
    assert all(row["correct"] and row["seconds"] > 0 and row["error"] < 1e-6 for row in ours)
    assert all(len(bench.cells(row)) == len(bench.COLUMNS) for row in ours)
    assert list(tmp_path.glob("*.png"))


def test_each_call_is_timed_as_often_and_in_turn():
    order = []
    calls = [lambda: order.append("a"), lambda: (order.append("b"), time.sleep(2e-3))]
    a, b = clock.seconds_in_turn(calls, torch.device("cpu"), budget=0.01)
    assert a < 1e-3 < 2e-3 <= b < 1
    assert order == ["a", "b"] * (len(order) // 2) and len(order) >= 16


def test_copy_moves_the_bytes_that_the_op_must_move(monkeypatch):
    moved = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda y, x: moved.append(x.nbytes + y.nbytes))
    clock.copying(4096, torch.device("cpu"))()
    assert moved == [4096]


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
