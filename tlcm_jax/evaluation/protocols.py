"""How published numbers were made: which prompts, how many, in how many steps, by which scores.

`evaluate --protocol NAME --scorers DIR` takes a protocol's scores from the folders DIR/SCORE, its
number of prompts and its steps. The prompts and the real images are the user's to fetch; what a
protocol has and this tool does not compute is named, in `absent`, and told with the result.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from absl import logging

from tlcm_jax.evaluation.scorers.base import Scorer
from tlcm_jax.evaluation.scorers.table import load_scorer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """A published table's way of measuring.

    Attributes:
      title: whose.
      prompts: which file holds them, and which real images the Frechet distances compare with.
      count: of prompts.
      steps: of the student.
      scores: names of `scorers.table.SCORERS`.
      absent: what the table has besides.
    """

    title: str
    prompts: str
    count: int
    steps: tuple[int, ...]
    scores: tuple[str, ...]
    absent: tuple[str, ...] = ()


PROTOCOLS: Mapping[str, Protocol] = {
    "tlcm": Protocol(
        title="TLCM's Table 1 (arXiv 2406.05768)",
        prompts="captions_val2017.json of COCO; real images: val2017",
        count=5000,
        steps=(2, 3, 4, 8),
        scores=("clip", "aesthetic", "image_reward", "fid"),
    ),
    "logcd": Protocol(
        title="LogCD's table on COCO (CVPR 2026)",
        prompts="captions_val2017.json of COCO; real images: val2017",
        count=5000,
        steps=(3,),
        scores=("clip", "image_reward", "fid"),
        absent=("MJHQ-5K (--protocol mjhq --limit 5000)", "GenEval (--layout geneval)"),
    ),
    "mjhq": Protocol(
        title="MJHQ-30K (Playground v2); LogCD scores 5 000 of it and does not say which",
        prompts="meta_data.json of playgroundai/MJHQ-30K; real images: its own",
        count=30000,
        steps=(3,),
        scores=("fid", "clip", "image_reward"),
    ),
    "dmd2": Protocol(
        title="DMD2's line (COCO-2014)",
        prompts="captions_val2014.json of COCO; real images: val2014",
        count=10000,
        steps=(4,),
        scores=("fid_512", "clip", "image_reward", "hps_v21", "pickscore", "mps"),
        absent=("HPSv3",),
    ),
}


def load_protocol(name: str, folder: str | Path) -> tuple[Protocol, tuple[Scorer, ...]]:
    """A protocol, and those of its scorers whose weights are there.

    Args:
      name: a key of `PROTOCOLS`.
      folder: holds a folder of weights for each score, by its name.

    Returns:
      The protocol, with the scores that lack weights moved to `absent` (each with why, and logged),
      and the scorers.

    Raises:
      ValueError: an unknown protocol, or weights that are another network's.
      FileNotFoundError: no score has weights.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol {name!r} is not one of {', '.join(PROTOCOLS)}")
    protocol, found, absent = PROTOCOLS[name], [], []
    for score in protocol.scores:
        try:
            found.append(load_scorer(score, str(Path(folder) / score)))
        except FileNotFoundError as error:
            absent.append(f"{score} ({error})")
    for line in absent:
        logging.warning("%s: absent: %s", name, line)
    if not found:
        raise FileNotFoundError(f"{folder} holds the weights of no score; {absent[0]}")
    names = tuple(scorer.name for scorer in found)
    return dataclasses.replace(protocol, scores=names, absent=(*protocol.absent, *absent)), tuple(
        found
    )
