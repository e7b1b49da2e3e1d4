"""Pickled checkpoints to safetensors, by the command that refusals name."""

import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch", reason="reading pickled checkpoints needs torch")

from tlcm_jax.io.convert_weights import convert_weights, main  # noqa: E402
from tlcm_jax.io.tensors import refuse_pickle  # noqa: E402

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(2.5).half()}


@pytest.mark.parametrize(
    "checkpoint",
    [
        WEIGHTS,
        {"state_dict": WEIGHTS, "epoch": 3, "optimizer": {"a.weight": torch.zeros(1)}},
        {"model": {f"module.{name}": value for name, value in WEIGHTS.items()}},
    ],
    ids=["plain", "state_dict", "wrapped"],
)
def test_weights_come_out_as_they_were(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "weights.pt")
    assert convert_weights(tmp_path / "weights.pt") == tmp_path / "weights.safetensors"
    found = load_file(tmp_path / "weights.safetensors")
    assert found.keys() == WEIGHTS.keys() and found["b"].dtype == np.float16
    np.testing.assert_array_equal(found["a.weight"], WEIGHTS["a.weight"].numpy())


class _Code:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_code_is_not_run(tmp_path, capsys):
    file = tmp_path / "weights.pth"
    file.write_bytes(pickle.dumps({"a": _Code()}))
    with pytest.raises(ValueError, match="not a checkpoint of tensors alone"):
        convert_weights(file)
    assert "must not run" not in capsys.readouterr().out
    torch.save({"epoch": 3}, file)
    with pytest.raises(ValueError, match="no named tensors"):
        convert_weights(file)
    with pytest.raises(SystemExit, match="none.pt is not a file"):
        main([str(tmp_path / "none.pt")])


def test_a_refusal_names_the_command(tmp_path):
    with pytest.raises(ValueError, match=f"python -m tlcm_jax.io.convert_weights {tmp_path}/x.pth"):
        refuse_pickle(tmp_path / "x.pth")
