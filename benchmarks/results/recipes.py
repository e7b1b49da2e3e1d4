"""Whole recipes at the same number of UNet evaluations: ours, the paper's, and its relatives'.

Each stage keeps the share of the evaluations that its recipe gives it. The relatives are what
`docs/terms.md` says they are: the method's idea in this code, not the authors' own program. All
are drawn at TLCM's times and, but for MCM (gamma 0), with all noise fresh between steps, which is
not every relative's own sampler.
A recipe that is not in `configs/` has no row.
"""

from benchmarks.results.ablation import FULL, PAPER
from benchmarks.results.experiment import ALL_STEPS, DEFAULT, Experiment, Table

OURS = Experiment(name="default", says="`emoji.py`: jumps to any time, M = 4, 2", recipe=DEFAULT)


def _relative(name: str, says: str) -> Experiment:
    return Experiment(name=name, says=f"`emoji_{name}.py`: {says}", recipe=f"emoji_{name}")


RECIPES = Table(
    name="recipes",
    title="Recipes at equal evaluations",
    says="Ours, ours with all terms of TLCM, the paper's two stages, all of the paper, and its "
    "relatives as recipes of this code, all drawn at TLCM's times with fresh noise between steps, "
    "but `mcm`, which has none.",
    steps=ALL_STEPS,
    shown=(1, 4),
    experiments=(
        OURS,
        _relative("full", "`default` and all terms of TLCM"),
        PAPER,
        Experiment(
            name="tlcm", says="`emoji_full.py:paper`: all of TLCM, M = 8, 4, 2", recipe=FULL
        ),
        _relative("lcm", "LCM, one segment"),
        _relative("pcm", "PCM, four phases, adversarial inside each"),
        _relative("hyper_sd", "Hyper-SD, jumps to any time, M = 8, 4, 2, 1"),
        _relative("dmd2", "DMD2, distribution matching and adversarial alone"),
        _relative("mcm", "multistep consistency models"),
        _relative("scott", "SCott, a stochastic teacher"),
    ),
)
