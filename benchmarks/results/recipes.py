"""Whole recipes at the same number of UNet evaluations: ours, the paper's, and its relatives'.

Each stage keeps the share of the evaluations that its recipe gives it. The relatives are what
`configs/shapes_relatives.py` says they are: the method's idea in this code, not the authors' own
program. All are drawn at TLCM's times and, but for MCM and TDM (gamma 0), with all noise fresh
between steps, which is not every relative's own sampler.
"""

from benchmarks.results.ablation import PAPER, TLCM
from benchmarks.results.experiment import ALL_STEPS, DEFAULT, Experiment, Table

OURS = Experiment(name="default", says="`shapes.py`: jumps to any time, M = 4, 2", recipe=DEFAULT)


def _relative(name: str, says: str, variant: str = "") -> Experiment:
    variant = variant or name
    return Experiment(name=name, says=f"`:{variant}`: {says}", recipe=f"shapes_relatives:{variant}")


RECIPES = Table(
    name="recipes",
    title="Recipes at equal evaluations",
    says="Ours, the paper's, and related methods as recipes of this code "
    "(`configs/shapes_relatives.py`), all drawn at TLCM's times with fresh noise between steps, "
    "but `mcm` and `tdm`, which have none.",
    steps=ALL_STEPS,
    shown=(2, 4),
    against="default",
    experiments=(
        OURS,
        PAPER,
        _relative("lcm", "LCM, one segment"),
        _relative("tdm", "TDM, matching along the student's trajectory"),
        _relative("dmd2", "DMD2, matching and adversarial alone"),
        _relative("hyper_sd", "Hyper-SD, jumps to any time, M = 8, 4, 2, 1"),
        TLCM,
        _relative("decoupled", "decoupled DMD, guidance at times of its own", "decoupled_dmd"),
        _relative("logcd", "LogCD, latent LPIPS for the square, hinge"),
        _relative("pcm", "PCM, four phases, adversarial inside each"),
        _relative("scott", "SCott, a stochastic teacher, real latents"),
        _relative("mcm", "multistep consistency models, real latents"),
        Experiment(
            name="full",
            says="`shapes_full.py`: `default` and all terms of TLCM",
            recipe="shapes_full",
        ),
    ),
)
