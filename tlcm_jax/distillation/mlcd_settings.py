"""The choices of stage 1 (`consistency.py`), checked."""

from dataclasses import dataclass

from tlcm_jax.diffusion.process import NoiseSchedule
from tlcm_jax.distillation.checks import check_at_least, check_at_most, check_choice, check_segments

# Where states come from, and how the teacher steps (`segment_pairs.py`).
MODES = ("node_reuse", "literal", "single_step", "data")
SOLVERS = ("ddim", "addim", "sde")


@dataclass(frozen=True, kw_only=True)
class SegmentConsistencySettings:
    """The choices of stage 1.

    Attributes:
      segments: M; 8 in the paper.
      skip: t_m - t_n, in training steps; 20 in the paper.
      teacher_substeps: p, the teacher's steps over the skip; 1 in the paper.
      solver: of these: "ddim", the paper's, "addim" (in mode "data") or "sde".
      guidance_scale: w of the teacher, fixed; 8 in the paper.
      mode: "node_reuse", ours, or "literal", the paper's; "single_step", the first rows of its
        ablation; or "data", noised real latents, which the batches must then hold. At 9 nodes a
        path a toy (2-D mixture, three seeds) reached the same error by the first two at equal
        samples, node reuse with 2.7 times fewer evaluations. A literal path has M steps: below 8
        segments the teacher is far off its trajectory (docs/results.md).
      nodes_per_segment: of a path, with node reuse; 1 is the paper's step length. More lie closer
        to the true ODE at the same cost a pair (toy error 0.049, 0.037, 0.034 for 1, 2, 4), for
        fewer prompts in a batch of pairs.
      huber: c of the pseudo-Huber distance mean(sqrt(e^2 + c^2) - c) of latents, in place of
        their mean square; 0, the paper's, is the mean square. LCM and SCott take 0.001.
      loss_space: "z", the paper's (4), or "x0", (5). On the miniature x0 won where jumps end at
        the milestone, z where they end at any time (docs/results.md); on the toy z.
      snr_limit: of the weight of times, 1 for all alike. None takes that of the loss's own
        source: 1 for "z", 5 for "x0".
      target: whose jump is the target in (4): the "student"'s own as it stands, as in the paper,
        or its "average"'s, which the stage must then keep (`ema_decay`).
      landing: where jumps end: "milestone", the paper's, or "trajectory", Hyper-SD's.
    """

    segments: int = 8
    skip: int = 20
    teacher_substeps: int = 1
    solver: str = "ddim"
    guidance_scale: float = 8.0
    mode: str = "node_reuse"
    nodes_per_segment: int = 2
    huber: float = 0.0
    loss_space: str = "z"
    snr_limit: float | None = None
    target: str = "student"
    landing: str = "milestone"

    def __post_init__(self):
        check_at_least("segments", self.segments, 1)
        check_at_least("skip", self.skip, 1)
        check_at_least("guidance_scale", self.guidance_scale, 0)
        check_at_least("teacher_substeps", self.teacher_substeps, 1)
        check_at_most("teacher_substeps", self.teacher_substeps, self.skip, "the times of the skip")
        check_choice("solver", self.solver, SOLVERS)
        check_choice("mode", self.mode, MODES)
        if self.solver == "addim" and self.mode != "data":
            raise ValueError("solver = 'addim': needs real latents, mode = 'data'")
        short = self.segments > 1 or self.landing == "trajectory"
        if self.solver == "sde" and self.loss_space == "x0" and short:
            # Over a short jump there is no bound to the x0 that explains fresh noise.
            raise ValueError(
                "solver = 'sde': compares x0 over one whole segment only; use loss_space = 'z'"
            )
        check_choice("target", self.target, ("student", "average"))
        check_at_least("nodes_per_segment", self.nodes_per_segment, 1)
        check_at_least("huber", self.huber, 0)
        check_choice("loss_space", self.loss_space, ("z", "x0"))
        check_at_least("snr_limit", self.time_limit, 1)
        check_choice("landing", self.landing, ("milestone", "trajectory"))

    @property
    def time_limit(self) -> float:
        """The `snr_limit` that holds."""
        if self.snr_limit is None:
            return 5.0 if self.loss_space == "x0" else 1.0
        return self.snr_limit

    def check(self, schedule: NoiseSchedule) -> None:
        """Raises a ValueError if these settings do not fit the time axis of `schedule`."""
        check_segments(schedule, self.segments, "nodes_per_segment", self.nodes_per_segment)
