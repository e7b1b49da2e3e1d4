import pytest

from tlcm_jax.planning.cycles import Kernel
from tlcm_jax.planning.kernels import seconds
from tlcm_jax.planning.topologies import DEVICES


def test_splash_by_its_schedule():
    forward = Kernel(name="splash_mha_fwd_residuals", shape=(1, 10, 4096, 64), turns=1)
    # 80 tiles of 9826 bundles at 1.5 GHz.
    assert seconds(forward, DEVICES["v5e"]) == pytest.approx(80 * 9826 / 1.5e9, rel=0.02)
    back = Kernel(name="splash_mha_dkv", shape=forward.shape, turns=3)
    assert seconds(back, DEVICES["v5e"]) == pytest.approx(3 * 80 * 20335 / 1.5e9, rel=0.02)
    squeezed = Kernel(name=forward.name, shape=forward.shape[1:], turns=1)
    assert seconds(squeezed, DEVICES["v5e"]) == seconds(forward, DEVICES["v5e"])


def test_others_have_no_model():
    with pytest.raises(ValueError, match="'paged'"):
        seconds(Kernel(name="paged", shape=(1, 1, 1, 1), turns=1), DEVICES["v5e"])
