"""Stage 1: data-free multistep latent consistency distillation (TLCM, arXiv 2406.05768).

The time axis is cut into M segments (diffusion/paths.py). Inside a segment with lower milestone b
the student learns to jump to b in one step,

    f(z, t)    = x0 predicted by the student from eps(z, t),                     (1)
    g(z, t, b) = DDIM(z, f(z, t), t -> b),                                       (2)

by agreeing with itself at two neighbouring points of one teacher trajectory,

    t_n = max(t_m - skip, b),   z_n = DDIM(z_m, x0_w(z_m, t_m), t_m -> t_n),      (3)
    L = || g(z_m, t_m, b) - stopgrad g(z_n, t_n, b) ||^2,                        (4)

where x0_w is the guided teacher's, and where t_n = b the target is z_n itself: there the teacher
enters, and from there its knowledge moves up the segment. No image is needed: z_m lies on the
teacher's own path from noise. (`segment_pairs.py`: the paths, noised pictures in their place for
the relatives that have some, and other steps of the teacher than (3).)

*Node reuse*, the default: one path visits nodes in every segment, and the guided eps at a node
gives both the path's next jump and, by arithmetic alone, the pair (3). K nodes cost K guided calls
and make K pairs. *Literal*, the paper's algorithm: one pair a path, at the path's end.
*Single step*: one too, a single step of the teacher away from noise.

With `loss_space` "x0", (4) is compared as x0, as in multistep consistency models (Heek et al.
2024, arXiv 2403.06807): DDIM is solved for the x0 that leads to the target,

    L = || f(z_m, t_m) - x0* ||^2,   DDIM(z_m, x0*, t_m -> b) = stopgrad g(z_n, t_n, b).    (5)

Times may be weighed in either space, by min(SNR(t_m) + 1, snr_limit).

With `landing` "trajectory" the jump ends anywhere between, as in Hyper-SD (Ren et al. 2024, arXiv
2404.13686): b in (3) stays, and in (4) s ~ U{b .. t_n} takes its place.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from tlcm_jax.diffusion import ddim
from tlcm_jax.diffusion.guidance import forwards
from tlcm_jax.diffusion.prediction import Denoiser, predict_x0
from tlcm_jax.diffusion.process import NoiseSchedule, broadcast
from tlcm_jax.distillation.mlcd_pairs import SegmentPairs, make_pairs
from tlcm_jax.distillation.mlcd_settings import SegmentConsistencySettings
from tlcm_jax.distillation.networks import Networks
from tlcm_jax.distillation.objective import (
    Evaluations,
    Objective,
    Parts,
    consistency,
    mean_square,
    pseudo_huber,
    snr_weight,
)


def examples_per_prompt(settings: SegmentConsistencySettings) -> int:
    """Pairs that one prompt of a batch makes: the K nodes of its path, or one."""
    if settings.mode == "node_reuse":
        return settings.segments * settings.nodes_per_segment + 1
    return 1


def needs_latents(settings: SegmentConsistencySettings) -> bool:
    """Whether batches must hold real latents."""
    return settings.mode == "data"


def evaluations_per_sample(settings: SegmentConsistencySettings) -> Evaluations:
    """Network forwards a pair.

    K guided calls make K pairs; M + 1 make the literal one, and 2 a single step's. The teacher's
    further sub-steps are a call each.
    """
    calls = {"literal": settings.segments + 1, "single_step": 2}.get(settings.mode, 1)
    calls += settings.teacher_substeps - 1
    teacher = forwards(settings.guidance_scale) * calls
    return Evaluations(teacher=teacher, target=1.0, student=1.0)


def segment_consistency(
    networks: Networks,
    schedule: NoiseSchedule,
    latent_shape: tuple[int, int, int],
    settings: SegmentConsistencySettings,
) -> Objective:
    """Stage 1 as an objective.

    Args:
      networks: student, teacher, null conditioning.
      schedule: the teacher's noise schedule.
      latent_shape: (h, w, c) of the latents.
      settings: the choices. With `mode` "literal" a pair costs M + 1 guided calls, 2 (M + 1)
        teacher forwards, whatever its segment: paths of 1 to M steps run in lock-step, as they
        must on an accelerator, and the shorter ones wait at their end.

    Returns:
      The objective; its examples are `SegmentPairs`, `examples_per_prompt` of them a prompt. Its
      metric `mse_z` is (4), whichever loss is chosen.

    Raises:
      ValueError: the settings do not fit the schedule.
    """
    settings.check(schedule)
    produce = make_pairs(networks, schedule, latent_shape, settings)

    def predict(student: Denoiser, pairs: SegmentPairs) -> Float[Array, "n h w c"]:
        return predict_x0(student, schedule, pairs.z_m, pairs.t_m, pairs.conditioning)

    def goal(target: Denoiser, pairs: SegmentPairs) -> Float[Array, "n h w c"]:
        _, _, z_n, t_n, boundary, conditioning, _ = pairs
        x0_n = predict_x0(target, schedule, z_n, t_n, conditioning)
        jump = ddim.step(schedule, z_n, x0_n, t_n, boundary)
        return jax.lax.stop_gradient(jnp.where(broadcast(t_n == boundary), z_n, jump))

    def land(x0: Float[Array, "n h w c"], pairs: SegmentPairs) -> Float[Array, "n h w c"]:
        return ddim.step(schedule, pairs.z_m, x0, pairs.t_m, pairs.boundary)

    def distance(
        x0_m: Float[Array, "n h w c"], goal: Float[Array, "n h w c"], pairs: SegmentPairs
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        error = land(x0_m, pairs) - goal  # (4)
        mse_z = mean_square(error)
        if settings.loss_space == "x0":
            x0_goal = ddim.inverse(schedule, pairs.z_m, goal, pairs.t_m, pairs.boundary)
            error = x0_m - x0_goal  # (5)
        error = pseudo_huber(error, settings.huber) if settings.huber else mean_square(error)
        weight = snr_weight(schedule, pairs.t_m, settings.time_limit)
        return weight * error, {"mse_z": mse_z}

    def refresh(pairs: SegmentPairs, key: PRNGKeyArray) -> SegmentPairs:
        del key
        return pairs  # the two of a pair belong together

    parts = Parts(
        predict=predict,
        goal=goal,
        land=land,
        level=lambda pairs: pairs.boundary,
        distance=distance,
        refresh=refresh,
        sample=(lambda pairs: pairs.data) if needs_latents(settings) else None,
        average=settings.target == "average",
    )
    return consistency(networks, produce, parts)
