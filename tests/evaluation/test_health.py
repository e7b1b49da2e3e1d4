"""Health of images: its values against scipy and by hand, its warnings, its log."""

import logging

import numpy as np
import pytest
from scipy import ndimage

from tlcm_jax.evaluation.health import HealthLog, curves, health, told, warnings

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 3, 9, 8, 3)).astype(np.uint8)


def test_values_are_those_of_their_definitions():
    x = IMAGES / 255
    found = health(IMAGES)
    smooth = ndimage.uniform_filter(x, (0, 0, 3, 3, 0), mode="nearest")
    assert found["detail"] == pytest.approx(np.mean((x - smooth) ** 2), rel=1e-5)
    assert found["saturation"] == pytest.approx(np.ptp(x, axis=-1).mean(), rel=1e-5)
    apart = [np.sqrt(np.mean((a - b) ** 2)) for a, b in zip(*x, strict=True)]
    assert found["diversity"] == pytest.approx(np.mean(apart), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("saturation", lambda x: x.mean(-1, keepdims=True).repeat(3, -1), "pale"),
        ("detail", lambda x: ndimage.uniform_filter(x, (0, 0, 3, 3, 0)), "blurred"),
        ("diversity", lambda x: np.stack([x[0], x[0]]), "alike for one prompt"),
    ],
)
def test_each_fault_is_named(name, change, said):
    teacher = health(IMAGES)
    assert warnings(teacher, teacher) == []
    student = health(change(IMAGES.astype(np.float64)).astype(np.uint8))
    assert any(name in line and said in line for line in warnings(student, teacher))


def test_a_resumed_run_writes_its_rows_again(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    log = HealthLog(path=tmp_path / "health.jsonl")
    values = health(IMAGES) | {"all_checks": 0.5}
    for step in (10, 20, 30, 20):
        log.write(step, "first", {**values, "detail": values["detail"] * step}, values)
    assert [row["step"] for row in log.rows()] == [10, 20]
    assert "detail 20.00" in caplog.text and "all_checks 0.500 (0.500)" in caplog.text
    found = {curve.title: curve for curve in curves(log.rows())}
    assert list(found["detail"].values) == pytest.approx([10, 20])
    assert curves(log.rows()[:1]) == []
    assert told(values, values).startswith("of the teacher's saturation 1.00, detail 1.00")
    log.path.write_text("{half a li")
    assert log.rows() == [] and "begun again" in caplog.text
