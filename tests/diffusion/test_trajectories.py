import jax
import jax.numpy as jnp
import numpy as np

from tests.support.noise import times as times_of
from tlcm_jax.diffusion import gaussian, timesteps
from tlcm_jax.diffusion.trajectories import teacher_path


def test_a_path_is_a_loop_of_steps_with_one_call_a_point(process, shape):
    data = gaussian.Gaussian(jnp.full((3, *shape), 0.4), jnp.full((3, *shape), 0.3))
    keys = jax.random.split(jax.random.key(0), 3)
    times = timesteps.stratified_times(process, keys, 8, 2)
    times = jnp.concatenate([times, times_of(process, [[0]] * 3)], axis=1)
    noise = jax.random.normal(jax.random.key(1), (3, *shape))
    oracle, calls = gaussian.denoiser(process), []

    def counting(z, t, conditioning):
        jax.debug.callback(lambda: calls.append(1))
        return oracle(z, t, conditioning)

    walk = jax.jit(lambda noise: teacher_path(counting, process, noise, times, data))
    points, last = walk(noise)
    jax.effects_barrier()
    assert len(calls) == 17 == len(points.z)
    np.testing.assert_array_equal(points.t, times[:, :-1].T)

    z = noise
    for k in range(17):
        t, s = times[:, k], times[:, k + 1]
        x0 = oracle(z, t, data)
        np.testing.assert_allclose(points.z[k], z, atol=1e-5)
        np.testing.assert_allclose(points.x0[k], x0, atol=1e-5)
        z = process.step(z, x0, t, s)
    np.testing.assert_allclose(last, z, atol=1e-5)


def test_a_path_that_has_arrived_stays_to_the_last_bit(process):
    data = gaussian.Gaussian(jnp.zeros((1, 2, 2)), jnp.ones((1, 2, 2)))
    noise = jax.random.normal(jax.random.key(1), (1, 2, 2))
    walk = jax.jit(
        lambda times: teacher_path(gaussian.denoiser(process), process, noise, times, data)
    )
    points, last = walk(times_of(process, [[999, 500, 300, 300, 300, 300]]))
    for z in (*points.z[2:], last):
        np.testing.assert_array_equal(z, points.z[2])
