"""Stage 1: data-free multistep latent consistency distillation (MLCD; TLCM, arXiv 2406.05768).

The time axis is cut into M segments (diffusion/timesteps.py). Inside a segment with lower bound b
the student learns to jump to b in one step,

    f(z, t)    = x0 predicted by the student,                                    (1)
    g(z, t, b) = step(z, f(z, t), t -> b),                                       (2)

by agreeing with itself at two neighbouring points of one teacher trajectory,

    t_n = max(t_m - skip, b),   z_n = step(z_m, x0_w(z_m, t_m), t_m -> t_n),      (3)
    L = || g(z_m, t_m, b) - stopgrad g(z_n, t_n, b) ||^2,                        (4)

where x0_w is the guided teacher's, and where t_n = b the target is z_n itself: there the teacher
enters, and from there its knowledge moves up the segment. No image is needed: z_m lies on the
teacher's own path from noise (`mlcd_pairs.py`).

With `loss_space` "x0", (4) is compared as x0, as in multistep consistency models (Heek et al.
2024, arXiv 2403.06807): the step is solved for the x0 that leads to the target,

    L = || f(z_m, t_m) - x0* ||^2,   step(z_m, x0*, t_m -> b) = stopgrad g(z_n, t_n, b).    (5)

Times may be weighed in either space, by min(SNR(t_m) + 1, snr_limit).

With `target_time` "uniform" the jump ends anywhere between, as in consistency trajectory models
(Kim et al. 2023, arXiv 2310.02279) and Hyper-SD (Ren et al. 2024, arXiv 2404.13686): b in (3)
stays, and in (4) s ~ U{b .. t_n} takes its place.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from tlcm_jax.diffusion.guidance import Denoiser, nfe
from tlcm_jax.diffusion.process import bcast_right
from tlcm_jax.distillation import losses
from tlcm_jax.distillation.checks import check_at_least, check_at_most, check_choice, check_segments
from tlcm_jax.distillation.mlcd_pairs import MODES, SOLVERS, PairOptions, sample_mlcd_pairs
from tlcm_jax.distillation.networks import Frozen, Networks, Params
from tlcm_jax.distillation.objective import NFE, Objective, Pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLCDSettings(PairOptions):
    """The choices of stage 1: those of its pairs, and of the loss.

    Attributes:
      huber: c of the pseudo-Huber distance mean(sqrt(e^2 + c^2) - c) of latents, in place of
        their mean square; 0, the paper's, is the mean square. LCM and SCott take 0.001.
      loss_space: "z", the paper's (4), or "x0", (5). On the miniature x0 won where jumps end at
        the milestone, z where they end at any time (docs/results.md).
      snr_limit: of the weight of times, 1 for all alike. None takes that of the loss's own
        source: 1 for "z", 5 for "x0".
      target: whose jump is the target in (4): the "student"'s own as it stands, as in the paper,
        or its "ema"'s, which the stage must then keep (`ema_decay`).
    """

    huber: float = 0.0
    loss_space: str = "z"
    snr_limit: float | None = None
    target: str = "student"

    def __post_init__(self) -> None:
        check_at_least("segments", self.segments, 1)
        check_at_least("skip", self.skip, 1)
        check_at_least("guidance_scale", self.guidance_scale, 0)
        check_at_least("teacher_substeps", self.teacher_substeps, 1)
        check_at_most("teacher_substeps", self.teacher_substeps, self.skip, "the times of the skip")
        check_choice("solver", self.solver, SOLVERS)
        check_choice("mode", self.mode, MODES)
        if self.solver == "addim" and self.mode != "data":
            raise ValueError("solver = 'addim': needs real latents, mode = 'data'")
        short = self.segments > 1 or self.target_time == "uniform"
        if self.solver == "sde" and self.loss_space == "x0" and short:
            # Over a short jump there is no bound to the x0 that explains fresh noise.
            raise ValueError(
                "solver = 'sde': compares x0 over one whole segment only; use loss_space = 'z'"
            )
        check_choice("target", self.target, ("student", "ema"))
        check_at_least("points_per_segment", self.points_per_segment, 1)
        check_at_least("huber", self.huber, 0)
        check_choice("loss_space", self.loss_space, ("z", "x0"))
        check_at_least("snr_limit", self.effective_snr_limit, 1)
        check_choice("target_time", self.target_time, ("milestone", "uniform"))

    @property
    def effective_snr_limit(self) -> float:
        """The `snr_limit` that holds."""
        if self.snr_limit is None:
            return 5.0 if self.loss_space == "x0" else 1.0
        return self.snr_limit

    def build(self, networks: Networks) -> "MLCD":
        """The objective on `networks`.

        Raises:
          ValueError: settings that do not fit the process's time axis.
        """
        check_segments(
            networks.process, self.segments, "points_per_segment", self.points_per_segment
        )
        return MLCD(self, networks)


@dataclasses.dataclass(frozen=True)
class MLCD(Objective):
    """Equations (1) to (5) as an objective; its metric `mse_z` is (4), whichever loss is chosen."""

    settings: MLCDSettings

    @property
    def needs_latents(self) -> bool:  # type: ignore[override]
        """See `Objective`."""
        return self.settings.mode == "data"

    @property
    def has_sample(self) -> bool:  # type: ignore[override]
        """See `Objective`."""
        return self.needs_latents

    @property
    def target_is_ema(self) -> bool:  # type: ignore[override]
        """See `Objective`."""
        return self.settings.target == "ema"

    @property
    def pair_settings(self) -> dict[str, Any]:  # type: ignore[override]
        """See `Objective`: the loss has no part in them."""
        names = (field.name for field in dataclasses.fields(PairOptions))
        return {name: getattr(self.settings, name) for name in names}

    @property
    def pairs_per_prompt(self) -> int:
        """The K points of a prompt's path, with node reuse; else one."""
        if self.settings.mode == "node_reuse":
            return self.settings.segments * self.settings.points_per_segment + 1
        return 1

    @property
    def nfe_per_pair(self) -> NFE:
        """Forwards a pair.

        With node reuse K guided calls make K pairs; M + 1 make one of the paper's algorithm
        (paths of 1 to M steps run in lock-step, as they must on an accelerator), and 2 one that is
        a single step from noise. The teacher's further sub-steps are a call each.
        """
        chosen = self.settings
        calls = {"paper": chosen.segments + 1, "one_step_state": 2}.get(chosen.mode, 1)
        calls += chosen.teacher_substeps - 1
        return NFE(teacher=nfe(chosen.guidance_scale) * calls, target=1.0, student=1.0)

    def sample_pairs(
        self, trainable: Params, frozen: Frozen, batch: Mapping[str, Any], keys: Key[Array, " b"]
    ) -> Pairs:
        """See `Objective`; the student has no part in them."""
        del trainable
        return sample_mlcd_pairs(self.networks, self.settings, frozen, batch, keys)

    def target(self, denoiser: Denoiser, pairs: Pairs) -> Float[Array, " n *latent"]:
        """The right side of (4)."""
        x0_n = denoiser(pairs.z_n, pairs.t_n, pairs.conditioning)
        jump = self.networks.process.step(pairs.z_n, x0_n, pairs.t_n, pairs.target_time)
        arrived = bcast_right(pairs.t_n == pairs.target_time, jump)
        return jax.lax.stop_gradient(jnp.where(arrived, pairs.z_n, jump))

    def jump(self, x0: Float[Array, " n *latent"], pairs: Pairs) -> Float[Array, " n *latent"]:
        """Equation (2), from the noisier point."""
        return self.networks.process.step(pairs.z_m, x0, pairs.t_m, pairs.target_time)

    def loss(
        self,
        x0: Float[Array, " n *latent"],
        target: Float[Array, " n *latent"],
        pairs: Pairs,
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        """Equation (4) or (5)."""
        chosen, process = self.settings, self.networks.process
        ours, theirs = self.jump(x0, pairs), target  # (4)
        mse_z = losses.mse(ours, theirs)
        if chosen.loss_space == "x0":
            ours = x0
            theirs = process.inverse_step(pairs.z_m, target, pairs.t_m, pairs.target_time)  # (5)
        if chosen.huber:
            distance = losses.pseudo_huber(ours, theirs, chosen.huber)
        else:
            distance = losses.mse(ours, theirs)
        snr = process.snr(pairs.t_m)
        weight = losses.min_snr_weight(snr, chosen.effective_snr_limit)
        return weight * distance, {"mse_z": mse_z}
