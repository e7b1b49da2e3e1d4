"""Changes of ours to the paper's recipe, one at a time, at the same number of UNet evaluations.

`STAGES` changes `emoji.py:paper`. Where a change alters how many pairs a prompt makes, the prompts
of a refill change with it, and an update still has 33 to 36 pairs: at equal evaluations a pair's
cost alone then decides how many updates there are.

    literal       the paper's algorithm, one pair a path, against node reuse
    nodes1 ..     points a segment, and so a path: 9, 33, 49 against 17
    landing       jumps to any time of a segment, as Hyper-SD's, against its milestone
    loss_x0       the loss as x0, weighted by min(SNR + 1, 5), against z
    loss_x0_flat  the same, all times weighted alike
    states1       one state a rollout in stage 2, against 4
    ema           the average of stage 2's updates is what is drawn with, against the last one

`PARTS` takes `emoji.py`, the default, apart.

    jumps4        its first stage alone, 4 segments
    jumps2        its second alone, 2 segments
    jumps_pair    both, one pair a path, the paper's literal algorithm, against node reuse
    jumps_x0      both, the loss as x0, weighted by min(SNR + 1, 5), against z
    average       both, drawn with the average of the second's updates, against the last one
    regression    `emoji.py:regression`: a third stage, whole trajectories
    ends          that stage alone, at the rate of a first one

`ENDS` changes the last of these.

    own0          no path begins at the student's own states, against 30 % of them
    snr5          weights min(SNR + 1, 5), against all times alike
    path25        every point of a path of 25 steps is a state, against 8 milestones of 16
    epochs4       each path is gone through 4 times, against once
"""

from benchmarks.results.ablation import PAPER
from benchmarks.results.experiment import ALL_STEPS, DEFAULT, Experiment, Table
from benchmarks.results.measure import LPIPS_TO_TEACHER
from benchmarks.results.recipes import OURS

# Six measures at five step counts would bury what these tables say.
_FOLLOWED = ("object_top1", "frechet_distance", LPIPS_TO_TEACHER)


def _paper(name: str, says: str, **changes: object) -> Experiment:
    """The paper's recipe; `changes` by config key below `stages.`, with `__` for each dot."""
    return _changed("emoji:paper", name, says, changes)


def _ends(name: str, says: str, **changes: object) -> Experiment:
    """Regression on whole trajectories alone, at a first stage's rate, 6 updates a refill."""
    alone = dict(trajectories__learning_rate=3e-4, trajectories__prompts_per_refill=24)
    changes = {**alone, **changes}
    return _changed("emoji:regression", name, says, changes, ("trajectories",))


def _changed(
    recipe: str, name: str, says: str, changes: dict[str, object], stages: tuple[str, ...] = ()
) -> Experiment:
    dotted = {"stages." + key.replace("__", "."): value for key, value in changes.items()}
    return Experiment(name=name, says=says, recipe=recipe, stages=stages, changes=dotted)


def _points(count: int, prompts: int, batch_size: int) -> Experiment:
    return _paper(
        f"nodes{count}",
        f"{8 * count + 1} points a path",
        segments__settings__points_per_segment=count,
        segments__prompts_per_refill=prompts,
        segments__batch_size=batch_size,
    )


STAGES = Table(
    name="improvements",
    title="Changes to the paper's stages",
    says="Each row changes one thing of `paper`: node reuse with 17 points a path, jumps to the "
    "milestones, the loss in z, 4 states a rollout.",
    experiments=(
        PAPER,
        _paper(
            "literal",
            "the paper's literal algorithm: one pair a path",
            segments__settings__mode="paper",
            segments__prompts_per_refill=68,
        ),
        _points(1, prompts=32, batch_size=36),
        _points(4, prompts=8, batch_size=33),
        _points(6, prompts=10, batch_size=35),
        _paper(
            "landing",
            "jumps to any time between, as Hyper-SD's",
            segments__settings__target_time="uniform",
        ),
        _paper(
            "loss_x0",
            "loss as x0, weighted by min(SNR + 1, 5)",
            segments__settings__loss_space="x0",
        ),
        _paper(
            "loss_x0_flat",
            "loss as x0, all times alike",
            segments__settings__loss_space="x0",
            segments__settings__snr_limit=1.0,
        ),
        _paper(
            "states1",
            "1 state a rollout",
            endpoints__settings__states_per_rollout=1,
            endpoints__prompts_per_refill=64,
        ),
        _paper("ema", "average of stage 2's updates, decay 0.95", endpoints__ema_decay=0.95),
    ),
)


_ALONE = _ends("ends", "whole trajectories alone")

PARTS = Table(
    name="parts",
    title="The default, taken apart",
    says="`default` is two stages of jumps to any time of a segment, 4 segments and then 2.",
    steps=ALL_STEPS,
    followed=_FOLLOWED,
    experiments=(
        OURS,
        _changed(DEFAULT, "jumps4", "the first stage alone", {}, ("segments4",)),
        _changed(DEFAULT, "jumps2", "the second stage alone", {}, ("segments2",)),
        _changed(
            DEFAULT,
            "jumps_pair",
            "the literal algorithm: one pair a path",
            {
                f"segments{count}__{key}": value
                for count in (4, 2)
                for key, value in dict(settings__mode="paper", prompts_per_refill=68).items()
            },
        ),
        _changed(
            DEFAULT,
            "jumps_x0",
            "loss as x0, weighted by min(SNR + 1, 5)",
            {f"segments{count}__settings__loss_space": "x0" for count in (4, 2)},
        ),
        _changed(
            DEFAULT,
            "average",
            "average of the second stage's updates, decay 0.98",
            {"segments2__ema_decay": 0.98},
        ),
        Experiment(
            name="regression",
            says="`emoji.py:regression`: then the ends of whole trajectories",
            recipe="emoji:regression",
            shares={"segments4": 45, "segments2": 35, "trajectories": 20},
        ),
        _ALONE,
    ),
)

ENDS = Table(
    name="trajectories",
    title="Regression on the ends of whole trajectories",
    says="Each row changes one thing of `ends`: 8 milestones of a 16-step path, all weighted "
    "alike, and 30 % of the paths from the student's own states.",
    steps=ALL_STEPS,
    followed=_FOLLOWED,
    experiments=(
        _ALONE,
        _ends("own0", "all paths from noise", trajectories__settings__own_states=0.0),
        _ends("snr5", "weights min(SNR + 1, 5)", trajectories__settings__snr_limit=5.0),
        _ends(
            "path25",
            "every point of a 25-step path is a state",
            trajectories__settings__segments=25,
            trajectories__settings__teacher_substeps=1,
            trajectories__prompts_per_refill=32,
        ),
        _ends("epochs4", "each path four times", trajectories__epochs=4),
    ),
)
