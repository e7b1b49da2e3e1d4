"""Runs: an experiment under one seed, where it leaves its scores, and what it was asked for."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import budget
from benchmarks.results.experiment import DEFAULT, Experiment, NotHere, Table, missing_files
from benchmarks.results.experiment import recipe as load_recipe
from tlcm_jax import paths
from tlcm_jax.config.schema import MAY_CHANGE, read

# What a run's folder holds beside the workdir of its training.
JOB, SCORES, FAILURE = "job.json", "scores.json", "failure.json"
PICTURES, LOG = "pictures.npz", "log.txt"
# The run that trains nothing.
TEACHER = "teacher"
# What preference may follow in this world, told of every row where its weights are there.
SCORER = "miniature.shapes.contrastive"
SCORER_WEIGHTS = paths.MINIATURE / "shapes/contrastive"
# How a process ends that was asked to stop and has saved: the same job resumes it.
STOPPED = 75


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What is drawn and scored at the end of a run.

    Attributes:
      prompts: file of held-out prompts.
      unseen: file of prompts of what the teacher never saw, drawn in 4 steps alone; or "".
      scorers: each as NAME or NAME=PATH.
      guidance_scale: of the teacher.
      gamma: share of fresh noise between the student's steps.
      steps: the student's step counts.
      limit: prompts used; 0 takes all.
      noise: seed of the noise, the same for all runs of one training seed.
      shown: how many prompts are kept for the contact sheets.
    """

    prompts: str
    unseen: str = ""
    scorers: tuple[str, ...]
    guidance_scale: float
    gamma: float
    steps: tuple[int, ...]
    limit: int = 0
    noise: int = 0
    shown: int = 8

    @classmethod
    def of(cls, config: Mapping[str, Any], steps: Sequence[int], limit: int, seed: int) -> "Asked":
        """What a recipe's own `evaluation` names, and the scorer that its preference may follow.

        Each training seed draws from noise of its own, so that the spread of a row's seeds is that
        of its scores, not of its training alone.
        """
        chosen = config["evaluation"]
        prompts, *further = map(str, chosen["prompts"])
        return cls(
            prompts=prompts,
            unseen=further[0] if further else "",
            scorers=(*chosen.get("scorers", ()), *((SCORER,) if SCORER_WEIGHTS.is_dir() else ())),
            guidance_scale=float(chosen["guidance_scale"]),
            gamma=float(chosen.get("gamma", 1.0)),
            steps=tuple(sorted(set(steps))),
            limit=limit,
            noise=seed,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One process's work.

    Attributes:
      name: the experiment's; `teacher` draws the recipe's teacher and trains nothing.
      seed: of the training, and of the noise that is drawn from.
      config: the recipe as it is run, plain values.
      asked: what is scored.
      folder: where it works and leaves its scores.
    """

    name: str
    seed: int
    config: Mapping[str, Any]
    asked: Asked
    folder: Path

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.name}, seed {self.seed}"

    @property
    def job(self) -> dict[str, Any]:
        """What `job.json` says."""
        plain = {
            "name": self.name,
            "seed": self.seed,
            "config": self.config,
            "asked": dataclasses.asdict(self.asked),
        }
        return json.loads(json.dumps(plain, default=str))

    def scores(self) -> dict[str, Any] | None:
        """What the finished run scored; None where it has not, or was asked for something else."""
        found = _json(self.folder / SCORES)
        return found if found is not None and found["asked"] == self.job["asked"] else None

    def failure(self) -> str:
        """Why it failed when it last ran, or ""."""
        found = _json(self.folder / FAILURE)
        return "" if found is None or self.scores() is not None else str(found["message"])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """All runs of a command.

    Attributes:
      evaluations: the total that each run uses, in UNet forwards.
      seeds: of each experiment.
      teachers: the run that those of a seed are compared with, by seed.
      runs: by experiment, one a seed.
      waiting: why an experiment has no runs, by its name: weights that are missing.
      absent: those that this version of the library cannot run, and why.
    """

    evaluations: float
    seeds: tuple[int, ...]
    teachers: Mapping[int, Run]
    runs: Mapping[str, tuple[Run, ...]]
    waiting: Mapping[str, str]
    absent: Mapping[str, str]


def plan(
    tables: Sequence[Table],
    workdir: Path,
    seeds: Sequence[int],
    share: float = 1.0,
    limit: int = 0,
) -> Plan:
    """Makes the runs of some tables; an experiment that several have is run once.

    Args:
      tables: what is compared.
      workdir: holds a folder an experiment.
      seeds: of the training and the noise.
      share: of `budget.WHOLE`, the default's evaluations, that each run uses.
      limit: prompts that are scored; 0 takes all.

    Raises:
      ValueError: two different experiments of one name, a wrong setting, or a wrong share.
    """
    if not share > 0 or not seeds:
        raise ValueError(f"budget {share}, seeds {list(seeds)}: give a positive one, and a seed")
    base = load_recipe(DEFAULT)
    evaluations = share * budget.WHOLE
    steps: dict[str, set[int]] = {}
    experiments: dict[str, Experiment] = {}
    for table in tables:
        for experiment in table.experiments:
            if experiments.setdefault(experiment.name, experiment) != experiment:
                raise ValueError(f"two experiments are called {experiment.name!r}")
            steps.setdefault(experiment.name, set()).update(table.steps)
    runs, waiting, absent = {}, {}, {}
    for name, experiment in experiments.items():
        try:
            config = sized(experiment, evaluations)
        except NotHere as reason:
            absent[name] = str(reason)
            continue
        if why := missing_files(read(config)):
            waiting[name] = why
            continue
        runs[name] = tuple(
            _run(name, config, Asked.of(config, tuple(steps[name]), limit, seed), seed, workdir)
            for seed in seeds
        )
    everything = tuple({count for counts in steps.values() for count in counts})
    teachers = {
        seed: Run(
            name=TEACHER,
            seed=seed,
            config=base,
            asked=Asked.of(base, everything, limit, seed),
            folder=workdir / TEACHER / f"seed{seed}-{teacher_digest(base).hex()[:8]}",
        )
        for seed in seeds
    }
    return Plan(
        evaluations=evaluations,
        seeds=tuple(seeds),
        teachers=teachers,
        runs=runs,
        waiting=waiting,
        absent=absent,
    )


def sized(experiment: Experiment, evaluations: float) -> dict[str, Any]:
    """An experiment's recipe at so many evaluations.

    Raises:
      NotHere, ValueError: as `Experiment.config`.
    """
    config = experiment.config()
    parts = experiment.shares or budget.shares(read(experiment.base()))
    config = budget.scaled(config, evaluations, parts)
    steps = sum(stage["steps"] for stage in config["stages"].values())
    # A killed run loses a tenth at most.
    return {**config, "checkpoint_every": max(1, steps // 10)}


def _run(name: str, config: Mapping[str, Any], asked: Asked, seed: int, workdir: Path) -> Run:
    config = {**config, "seed": seed}
    # By content: a changed recipe, budget or teacher is another run, and does not find the old
    # one's scores.
    learnt = {key: value for key, value in config.items() if key not in MAY_CHANGE}
    words = json.dumps(learnt, sort_keys=True, default=str).encode()
    digest = hashlib.blake2b(words + teacher_digest(config), digest_size=4).hexdigest()
    folder = workdir / name / f"seed{seed}-{digest}"
    return Run(name=name, seed=seed, config=config, asked=asked, folder=folder)


def teacher_digest(config: Mapping[str, Any]) -> bytes:
    """Of the weights that a recipe distils."""
    return _digest_of(str(config["model"]["path"]))


@functools.lru_cache
def _digest_of(folder: str) -> bytes:
    found = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(folder).rglob("*.safetensors")):
        found.update(path.read_bytes())
    return found.digest()


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
