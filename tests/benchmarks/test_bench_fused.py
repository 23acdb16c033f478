"""The benchmark of the fused operators counts, compares, judges and survives as it says; on the CPU, at tiny sizes."""

import csv
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from benchmarks import fused_rows, operators
from benchmarks.bench_fused import main
from benchmarks.clock import Ceilings, Clock, Timing
from benchmarks.contestants import CONTESTANTS, Prepared, Unavailable
from benchmarks.figures import attention_work, layer_norm_work, linear_cross_entropy_work, softmax_dropout_work
from benchmarks.fused_rows import OperatorBench, OperatorRow, figures, tasks
from benchmarks.isolation import Worker, WorkerFailed
from benchmarks.operators import MEASURED, cases, errors, wrong
from benchmarks.plot_bench import Options as PlotOptions
from benchmarks.plot_bench import main as plot
from benchmarks.targets import judge
from fused.dispatch import interpreted
from metro_megatron.cli.command_line import run_tool
from tests.test_imports import loaded_modules

CPU = torch.device("cpu")


def trial(operator: str, is_uniform: bool = True) -> operators.Case:
    return next(x for x in cases(is_trial=True) if x.operator == operator and x.is_uniform == is_uniform)


def test_work_is_that_of_the_roofline_table() -> None:
    """Microseconds at 4.3 TB/s and 790 TFLOP/s for base: 16,384 tokens, 12 heads of 64."""
    assert layer_norm_work(16_384, 768).forward / 4.3e6 == pytest.approx(23.4, abs=0.1)
    work = softmax_dropout_work(32, 12, 512)
    assert work.forward == work.backward and work.backward / 4.3e6 == pytest.approx(140, abs=1)
    work = attention_work(12, 64, [512] * 32)
    assert (work.forward / 790e6, work.backward / 790e6) == pytest.approx((32.6, 81.6), abs=0.1)
    assert attention_work(12, 64, [512, 256]).forward == 1.25 * attention_work(12, 64, [512]).forward
    work = linear_cross_entropy_work(2457, 768, 128_000)
    assert (work.forward / 790e9, work.both / 790e9) == pytest.approx((0.611, 1.834), abs=0.001)
    row = figures(work, {"forward": 1.0, "backward": 2.0, "both": 3.0}, Ceilings(4300.0, 790.0))
    assert row["forward_rate"] == row["backward_rate"] == row["both_rate"] == pytest.approx(483.07, abs=0.01)
    assert row["both_percent"] == pytest.approx(100 * 483.07 / 790, abs=0.01)


def test_the_presets_shapes() -> None:
    found = [case for case in cases() if case.preset in operators.SIZES]
    assert len(found) == 4 * len(MEASURED) and all(sum(case.lengths) == 16_384 for case in cases())
    assert {(case.hidden, case.heads * case.head_dim) for case in found} == {(h, h) for h in (768, 1024, 1536, 2560)}
    others = [case for case in cases() if case not in found]
    assert [case.head_dim for case in others] == [32, 128, 64] and not others[-1].is_uniform
    names = [task.contestant for task in tasks(list(MEASURED), ["eager", "compile", "flex_table"], False)]
    assert names == sorted(names, key=["ours", "eager", "compile", "flex_table"].index) or names[0] == "ours"
    assert names.count("ours") == len(cases()) and names.count("flex_table") == 1


@pytest.mark.parametrize("operator", MEASURED)
def test_the_check_passes_for_kernels_and_tells_what_is_wrong(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        assert wrong(errors(trial(operator), torch.device("cuda"))) == []
    else:
        with interpreted():
            found = errors(trial(operator), CPU)
        assert wrong(found) == [] and found["value"] > 0.0
    right = MEASURED[operator]

    def slightly_wrong(t, dropout):
        value, *ids = right.call(t, dropout)
        return (value * (1.1 if value.dtype != torch.float64 else 1.0), *ids)

    monkeypatch.setitem(MEASURED, operator, right._replace(call=slightly_wrong))
    found = errors(trial(operator), CPU)
    assert found["value"] == pytest.approx(0.1, abs=0.005) and any("value" in text for text in wrong(found))
    assert wrong({"value": float("nan"), "gradient of x": 0.01, "ids 0": 0.2}) == ["value nan", "ids 0 0.2"]


def run(name: str, case: operators.Case, needs_grad: bool = True) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Value and gradients without dropout, samples of attention as packed rows."""
    inputs = MEASURED[case.operator].inputs(case, CPU)
    prepared = CONTESTANTS[case.operator][name](case, inputs, 0.0)
    for leaf in prepared.leaves:
        leaf.requires_grad_(needs_grad)
    value = prepared.function()[0]
    flat = value
    if case.operator == "attention" and not name.startswith("ours") or case.operator == "softmax_dropout":
        flat = value.transpose(1, 2)[inputs["is_key"]]
    arriving = torch.randn(flat.shape, generator=torch.Generator().manual_seed(3))
    return flat.detach(), list(
        torch.autograd.grad((flat.float() * arriving).sum(), prepared.leaves)
    ) if needs_grad else []


@pytest.mark.parametrize(
    "operator, name, is_uniform",
    [
        ("layer_norm", "eager", True),
        ("softmax_dropout", "eager", True),
        ("attention", "eager", True),
        ("attention", "eager", False),
        ("attention", "sdpa", True),
        ("attention", "sdpa", False),
        ("attention", "flex", True),
        ("attention", "flex_table", True),
        ("attention", "ours_no_dropout", False),
        ("linear_cross_entropy", "eager", True),
    ],
)
def test_contestants_compute_what_ours_does(operator: str, name: str, is_uniform: bool) -> None:
    case = trial(operator, is_uniform)
    has_backward = not name.startswith("flex")  # on the CPU
    wanted, wanted_gradients = run("ours", case)
    got, gradients = run(name, case, has_backward)
    torch.testing.assert_close(got.float(), wanted.float(), atol=0.05, rtol=0.02)
    for one, other in zip(gradients, wanted_gradients, strict=False):
        if one.shape == other.shape:
            error = (one.double() - other.double()).norm() / other.double().norm()
            assert error < 0.02
    if operator == "attention" and has_backward and is_uniform:
        packed = [x.transpose(1, 2).flatten(0, 1) for x in gradients[:3]]
        for one, other in zip(packed, wanted_gradients, strict=False):
            assert (one.double() - other.double()).norm() / other.double().norm() < 0.02


@pytest.mark.skipif(not hasattr(functional, "linear_cross_entropy"), reason="torch has it since 2.13")
def test_torchs_head_is_the_sum_of_the_losses() -> None:
    case = trial("linear_cross_entropy")
    inputs = MEASURED[case.operator].inputs(case, CPU)
    one, all_of_them = (CONTESTANTS[case.operator][name](case, inputs, 0.0) for name in ("torch", "eager"))
    torch.testing.assert_close(one.function()[0], all_of_them.function()[0].sum().to(torch.bfloat16), rtol=0.02, atol=0)


def test_device_time_is_taken_between_events_behind_a_busy_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU, with a device whose milliseconds are the calls that it saw."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.place = 0

        def record(self) -> None:
            log.append("event")
            self.place = len(log)

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            return float(end.place - self.place)

    class Buffer:
        def copy_(self, other: "Buffer") -> None:
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(f"sleep {cycles >= 100}"), raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12_000_000)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: Buffer())
    clock = Clock(torch.device("cuda"), least=2, most=9)
    log.clear()
    timing = clock.measure(lambda name: log.append(name), lambda: "call", seconds=0.0)
    assert timing == Timing(2.0, 2)
    assert log[-12:] == ["flush", "sleep True", "event", "call", "event", "wait"] * 2
    assert log[:-12] == ["call"] * 4
    assert clock.peak_mb(lambda: None) == 7.0


def test_failures_are_rows_with_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(case, t, dropout):
        raise RuntimeError("no\nkernel image")

    def absent(case, t, dropout):
        raise Unavailable("not installed")

    def breaks_later(case, t, dropout):
        x = t["x"].requires_grad_()
        return Prepared(lambda: (x.detach(),), [x])

    session = OperatorBench(CPU)
    names = {"breaks": breaks, "absent": absent, "breaks_later": breaks_later}
    monkeypatch.setitem(CONTESTANTS, "layer_norm", {**CONTESTANTS["layer_norm"], **names})
    rows = {name: session.row(OperatorRow(trial("layer_norm"), name, 0.0)) for name in names}
    assert rows["breaks"]["status"] == "failed: RuntimeError: no kernel image"
    assert rows["absent"]["status"] == "unavailable: not installed"
    assert rows["breaks_later"]["status"].startswith("failed: RuntimeError: element 0 of tensors")
    assert not any(row["is_device_lost"] for row in rows.values())

    monkeypatch.setattr(fused_rows, "errors", lambda case, device: {"value": 0.3})
    row = session.row(OperatorRow(trial("layer_norm"), "ours", 0.0))
    assert row["status"] == "ok" and row["check"] == "wrong: value 0.3" and row["forward_ms"] > 0


def echo(offset: int):
    def answer(question: int) -> int:
        if question == 0:
            os._exit(5)
        time.sleep(max(0, question - 100))
        return question + offset

    return answer


def test_a_worker_survives_a_crash_and_a_hang() -> None:
    worker = Worker(echo, 7)
    try:
        assert worker.ask(1, 60.0) == 8
        with pytest.raises(WorkerFailed, match="exit code 5"):
            worker.ask(0, 60.0)
        assert worker.ask(2, 60.0) == 9
        with pytest.raises(WorkerFailed, match="no answer within 0 s"):
            worker.ask(1000, 0.2)
    finally:
        worker.close()


def row_of(operator: str, contestant: str, **columns: object) -> dict[str, object]:
    head = {"operator": operator, "preset": "base", "size": "s", "contestant": contestant, "status": "ok"}
    return {**head, "head_dim": 64, "is_uniform": True, **columns}


def test_targets() -> None:
    rows = [
        row_of("layer_norm", "ours", forward_percent=90.0, backward_percent=84.0, check="ok"),
        row_of("layer_norm", "ours", size="t", forward_percent=86.0, backward_percent=99.0, check="ok"),
        row_of("softmax_dropout", "ours", forward_percent=99.0, backward_percent=99.0, check="wrong: value 1"),
        row_of("attention", "ours", forward_rate=230.0, backward_rate=170.0, forward_ms=2.0, backward_ms=3.0),
        row_of("attention", "ours_no_dropout", forward_rate=999.0, backward_rate=1.0, forward_ms=1.0, backward_ms=2.0),
        row_of("attention", "ours", size="32", head_dim=32, forward_rate=1.0, backward_rate=1.0, forward_ms=9.0),
        row_of("attention", "flex", forward_ms=1.5, backward_ms=1.0),
        row_of("attention", "sdpa", status="failed: x"),
        row_of("linear_cross_entropy", "ours", both_percent=51.0, both_ms=2.0, peak_mb=100.0),
        row_of("linear_cross_entropy", "ours", size="x", preset="xxl", both_percent=64.0, both_ms=2.0, peak_mb=1.0),
        row_of("linear_cross_entropy", "eager", both_ms=3.0, peak_mb=490.0),
    ]
    found = {one.target: one for one in judge(rows)}
    results = {name: (one.result, one.value) for name, one in found.items()}
    assert results["layer_norm forward, % of copy bandwidth"] == ("met", 86.0)
    assert found["layer_norm forward, % of copy bandwidth"].at == "t"
    assert results["layer_norm backward, % of copy bandwidth"] == ("missed", 84.0)
    assert results["softmax_dropout forward, % of copy bandwidth"] == ("not measured", None)
    assert results["attention forward, TFLOP/s"] == ("met", 230.0)
    assert results["attention backward, TFLOP/s"] == ("missed", 170.0)
    assert results["attention forward, speed to flex"] == ("met", 1.5)
    assert results["attention backward, speed to flex"] == ("missed", 0.5)
    assert results["attention forward, speed to sdpa"] == ("not measured", None)
    assert results["linear_cross_entropy of base, % of matrix rate"] == ("met", 51.0)
    assert results["linear_cross_entropy of xxl, % of matrix rate"] == ("missed", 64.0)
    assert found["attention backward, TFLOP/s"].row()["limit"].startswith("176 today")
    assert results["linear_cross_entropy, speed to eager"] == ("met", 1.5)
    assert results["linear_cross_entropy, memory of eager"] == ("missed", 4.9)


def run_main(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of the command line."""
    monkeypatch.setattr("sys.argv", ["bench_fused.py", *argv])
    with pytest.raises(SystemExit) as caught:
        run_tool(main)
    return caught.value.code


def test_a_trial_writes_rows_provenance_targets_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tmp_path / "new" / "fused"
    options = ["--device", "cpu", "--against", "eager", "sdpa", "flex", "--output", str(prefix), "--commit", "abc"]
    assert run_main(options, monkeypatch) == 0
    (run,) = json.loads(prefix.with_name("fused.json").read_text())
    assert {"device", "driver", "torch", "triton", "python", "commit", "date", "command"} <= run.keys()
    assert run["torch"] == torch.__version__ and run["is_trial"] and "--commit abc" in run["command"]
    assert run["copy_gb_per_s"] > 0 and run["matrix_tflops"] > 0 and len(run["targets"]) == 16
    with prefix.with_name("fused.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(run["rows"]) == len(tasks(list(MEASURED), ["eager", "sdpa", "flex"], True))
    assert all(row["torch"] == torch.__version__ and row["commit"] for row in rows)
    ours = [row for row in rows if row["contestant"] == "ours"]
    assert all(row["status"] == row["check"] == "ok" and float(row["both_ms"]) > 0 for row in ours)
    flex = [row["status"] for row in rows if row["contestant"] == "flex"]
    assert torch.cuda.is_available() or any("backward on CPU" in status for status in flex)
    output = capsys.readouterr().out
    assert "A trial on the CPU" in output and "linear_cross_entropy of base, % of matrix rate" in output
    plot(PlotOptions(str(prefix.with_name("fused.csv")), str(tmp_path / "fused.png")))
    assert (tmp_path / "fused.png").stat().st_size > 10_000


def test_time_that_is_up_leaves_rows_that_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--device", "cpu", "--budget_s", "0", "--operators", "layer_norm", "--output", str(tmp_path / "a")]
    assert run_main(options, monkeypatch) == 0
    (run,) = json.loads((tmp_path / "a.json").read_text())
    assert {row["status"] for row in run["rows"]} == {"not run: the time was up (--budget_s)"}
    assert {one["result"] for one in run["targets"]} == {"not measured"}


def test_mistakes_are_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_main(["--device", "cpu", "--operators", "softmax"], monkeypatch) == 2
    assert "--operators: softmax; it can be attention, layer_norm" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert run_main([], monkeypatch) == 2
        assert "run this on a machine with one" in capsys.readouterr().err


def test_it_needs_torch_triton_and_numpy_only() -> None:
    allowed = {
        "torch",
        "triton",
        "numpy",
        "fused",
        "metro_megatron",
        "benchmarks",
        *__import__("sys").stdlib_module_names,
    }
    seen: set[str] = set()
    assert {name.split(".")[0] for name in loaded_modules("benchmarks.bench_fused", seen)} <= allowed
    assert {"benchmarks.operators", "benchmarks.contestants", "fused.attention"} <= seen


def test_small_cases_keep_the_widths() -> None:
    large = next(case for case in cases() if case.preset == "xxl" and case.operator == "attention")
    small = large.small()
    assert (small.hidden, small.heads, small.head_dim) == (2560, 40, 64) and sum(small.lengths) < 1000
    assert replace(small, lengths=large.lengths, masked=large.masked, vocab=large.vocab) == large
