"""Rows: what the file holds after a resume, what a row averages, and what TensorBoard gets."""

import errno
import json
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import pytest

from tlcm_jax.training.metrics import Meter, MetricsWriter, Progress


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_rows_beyond_the_restored_step_are_dropped(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.resume(0)
    for step in (10, 20, 30):
        writer.write({"step": step, "stage": "a", "loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    again = MetricsWriter(tmp_path)
    again.resume(20)
    assert [row["step"] for row in again.history] == [10, 20]
    again.write({"step": 25, "stage": "a", "loss": float("nan")})
    assert rows(tmp_path) == [
        {"step": 10, "stage": "a", "loss": 0.1}, {"step": 20, "stage": "a", "loss": 0.05},
        {"step": 25, "stage": "a", "loss": None},
    ]  # fmt: skip
    MetricsWriter(tmp_path).resume(0)
    assert rows(tmp_path) == []


@pytest.mark.parametrize(
    "line", [b"nonsense", b"[1]", b'{"step": "1"}', b'{"step": 1}', b"\xff\x00", b"[" * 100_000]
)
def test_lines_that_are_no_rows_are_left_out_and_the_file_kept(tmp_path, line, caplog):
    good = [b'{"step": 1, "stage": "a"}', b'{"step": 2, "stage": "a"}']
    content = b"\n".join([good[0], line, good[1], b""])
    (tmp_path / "metrics.jsonl").write_bytes(content)
    writer = MetricsWriter(tmp_path)
    writer.resume(2)
    assert [row["step"] for row in writer.history] == [1, 2]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == content
    assert "holds 1 lines that are no rows" in caplog.text


def test_the_folder_is_made_with_those_above_it(tmp_path):
    writer = MetricsWriter(tmp_path / "runs" / "first")
    writer.write({"step": 1})
    assert rows(tmp_path / "runs" / "first") == [{"step": 1}]


def test_other_processes_write_nothing(tmp_path):
    writer = MetricsWriter(tmp_path / "run", write=False)
    writer.resume(0)
    writer.write({"step": 1})
    writer.close()
    assert writer.history == [{"step": 1}] and not (tmp_path / "run").exists()


def test_tensorboard_gets_the_finite_scalars_when_it_is_there(tmp_path, monkeypatch):
    class SummaryWriter(list):
        def __init__(self, folder):
            self.folder = folder

        def write_scalars(self, step, scalars):
            self.append((step, scalars))

        def close(self):
            self.append("closed")

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "clu", types.SimpleNamespace(metric_writers=module))
    monkeypatch.setitem(sys.modules, "clu.metric_writers", module)
    writer = MetricsWriter(tmp_path)
    writer.write({"step": 3, "stage": "first", "loss": 0.5, "grad_norm": float("inf")})
    writer.close()
    assert writer._events == [(3, {"loss": 0.5}), "closed"]
    # Without TensorFlow the import inside clu fails: the file is written all the same.
    monkeypatch.setitem(sys.modules, "clu", None)
    assert MetricsWriter(tmp_path)._events is None


def step_metrics(loss, finite=True, grad_norm=1.0):
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(grad_norm),
            "finite": jnp.bool_(finite)}  # fmt: skip


def test_a_row_averages_its_steps_and_times_all_but_the_first(monkeypatch):
    clock = iter([7.0, 67.0, 71.0, 100.0, 108.0]).__next__
    monkeypatch.setattr("tlcm_jax.training.metrics.time.perf_counter", clock)
    meter = Meter(nfe_per_pair=3.0, batch_size=32)
    for loss, norm in ((1.0, 5.0), (2.0, 9.0), (6.0, 1.0)):
        meter.start()
        meter.add(step_metrics(loss, grad_norm=norm))
    assert meter.ready() == 3
    row, steps = meter.collect()
    assert all(step["finite"] for step in steps) and row["loss"] == 3.0
    assert [step["grad_norm"] for step in steps] == [5.0, 9.0, 1.0]
    assert row["grad_norm"] == 5.0 and row["grad_norm_max"] == 9.0
    assert row["steps"] == 3 and row["pairs"] == 96 and row["first_step_seconds"] == 60.0
    assert row["pairs_per_second"] == 2 * 32 / 4.0
    assert row["nfe_per_second"] == 3 * 2 * 32 / 4.0
    assert "finite" not in row and meter.ready() == 0
    meter.start()
    meter.add(step_metrics(1.0))
    meter.add(step_metrics(float("nan"), finite=False))
    row, steps = meter.collect()
    assert [step["finite"] for step in steps] == [True, False] and row["loss"] == 1.0
    assert "first_step_seconds" not in row
    assert row["pairs_per_second"] == 2 * 32 / 8.0


def test_a_row_of_the_first_step_alone_has_no_throughput():
    meter = Meter(nfe_per_pair=3.0, batch_size=32)
    meter.start()
    meter.add(step_metrics(1.0))
    row, _ = meter.collect()
    assert "pairs_per_second" not in row and row["first_step_seconds"] > 0


def test_the_bar_shows_steps_loss_and_throughput(capsys):
    progress = Progress("second", done=4, steps=10)
    progress.at(2)
    progress.settle({"steps": 3, "loss": 0.25, "pairs_per_second": 12.0, "nfe_per_second": 65.0})
    progress.close()
    shown = capsys.readouterr().err
    assert "7/10" in shown and "loss=0.25" in shown and "pairs/s=12" in shown
    assert "NFE/s=65" in shown and "second" in shown


def test_a_full_disk_says_which_file(tmp_path, monkeypatch):
    writer = MetricsWriter(tmp_path)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(
        OSError, match="no space left: cannot write .*metrics.jsonl; .*last checkpoint"
    ):
        writer.write({"step": 1})
