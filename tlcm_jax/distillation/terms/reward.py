"""Reward: samples that score well become likelier; scorers need no gradient.

A parser, or any Python function of images, tells how good a sample is and not in which direction a
better one lies. The student then learns from its own samples: a regression onto where its sampler
went, weighted by what that led to (reward-weighted regression: Peters and Schaal, ICML 2007). From
a state z_t the sampler goes to z_s = alpha_s x + sigma_s e with fresh noise e and x = f(z_t, t), so
each of its steps is drawn from N(alpha_s x, sigma_s^2 I); and with R the reward of the finished
sample and A = R less a baseline, the policy gradient of those steps is

    grad E[R] = - grad E[ A sum_s |z_s - alpha_s x|^2 / (2 sigma_s^2) ],         (1)

at the student that drew them (DPOK, arXiv 2305.16381; of consistency models: RLCM, arXiv
2404.03673). Each pair of the batch is one of the steps, and the mean over the n elements of a
latent stands for the sum:

    L = A |z_s - alpha_s x|^2 / (2 n sigma_s^2),                                 (2)
    A = sum_k w_k (r_k - mean r_k) / std r_k,                                    (3)

mean and deviation over the samples of a refill, r_k the score of scorer k. The last step adds no
noise and has no part in it.

The simpler regression onto the finished samples by the loss of a denoiser (Lee et al., arXiv
2302.12192) is not taken: what it asks at a time t is the mean of the samples that z_t may have come
from, which at high noise is a blur. That is right for a denoiser, and undoes a student that is to
be sharp in one step. (2) asks for nothing where all samples score alike: e has mean 0.

The images are decoded and scored on the host when the samples are made, once a refill, and not in
the update: no callback runs on a device, each process scores its own samples, and a scorer may be
any Python. It should be deterministic, or a resumed run is not the same run. (2) is (1) only for
the student that drew the samples: keep refills short (`prompts_per_refill`), and `epochs` at 1.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from tlcm_jax.distillation import losses
from tlcm_jax.distillation.networks import DECODER, Networks
from tlcm_jax.distillation.terms.base import Context, StudentOutputs, Term
from tlcm_jax.distillation.terms.scored import (
    ScoredSettings,
    ScorerSettings,
    followed,
    reward_hacking,
)
from tlcm_jax.evaluation.scorers.base import Scorer
from tlcm_jax.evaluation.scorers.table import load_scorer
from tlcm_jax.families.base import LatentModel
from tlcm_jax.models.lora import LoRAConfig

# Its name among the scores of a term's samples; the recipe's keys are the others'.
_HELD_OUT = "held_out"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardedSettings(ScorerSettings):
    """A scorer of (3).

    Attributes:
      measure: which of the numbers that it gives to an image; empty takes the first.
    """

    measure: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings(ScoredSettings):
    """The choices of the term.

    Attributes:
      scorers: those that are followed, by a name that is also in their metrics.
    """

    weight: float = 0.1
    scorers: Mapping[str, RewardedSettings]

    def __post_init__(self) -> None:
        super().__post_init__()
        if _HELD_OUT in self.scorers:
            raise ValueError(f"scorers: {_HELD_OUT!r} is the held-out reward's name; take another")
        followed(self.scorers, self)

    def load(self, model: LatentModel, networks: Networks, adapter: LoRAConfig) -> "Reward":
        """See `TermSettings`."""
        del adapter
        rewarded = {
            key: load_rewarded(chosen.scorer, chosen.weights, chosen.measure, chosen.weight)
            for key, chosen in followed(self.scorers, self).items()
        }
        if self.held_out:
            rewarded[_HELD_OUT] = load_rewarded(self.held_out, self.held_out_weights)
        return Reward(
            weight=self.weight,
            settings=self,
            networks=networks,
            rewarded=rewarded,
            image_shape=image_shape(model, networks),
        )


class Rewarded(NamedTuple):
    """A scorer, loaded: which measure of it, its sign, and w_k of (3); 0 is not followed."""

    scorer: Scorer
    measure: str
    sign: float
    weight: float

    def scores(self, images: np.ndarray, prompts: Sequence[str]) -> Float[np.ndarray, " n"]:
        """Of images, `[n, h, w, 3]` uint8; higher is better.

        Raises:
          ValueError: no finite number for each image.
        """
        values = self.scorer.values(images, prompts, {})
        if self.measure not in values or np.shape(values[self.measure]) != (len(images),):
            single = [name for name, each in values.items() if np.shape(each) == (len(images),)]
            raise ValueError(
                f"scorer {self.scorer.name!r} has no {self.measure!r} of a single image: reward "
                f"can follow {', '.join(single) or 'none of its measures'}"
            )
        scores = self.sign * np.asarray(values[self.measure], np.float32)
        if not np.all(np.isfinite(scores)):
            raise ValueError(
                f"scorer {self.scorer.name!r} gives an image a score that is no number"
            )
        return scores


def load_rewarded(name: str, weights: str, measure: str = "", weight: float = 0.0) -> Rewarded:
    """A scorer by its name, with the measure that is asked for or else its first.

    Raises:
      ValueError: an unknown name.
      FileNotFoundError: weights are missing.
    """
    scorer = load_scorer(name, weights)
    known = {each.key: each.higher_is_better for each in scorer.measures}
    measure = measure or next(iter(known))
    return Rewarded(scorer, measure, 1.0 if known.get(measure, True) else -1.0, weight)


def image_shape(model: LatentModel, networks: Networks) -> tuple[int, int, int]:
    """Of the images that a stage's latents decode to.

    Raises:
      ValueError: there is no decoder.
    """
    if networks.decode is None:
        raise ValueError("reward needs a decoder, and the model has none")
    latent = jax.ShapeDtypeStruct((1, *networks.latent_shape), jnp.float32)
    weights, decode = model.params[model.decoder], networks.decode
    images = jax.eval_shape(lambda w, x: decode({DECODER: w})(x), weights, latent)
    return images.shape[1:]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward(Term):
    """Equations (2) and (3); its metrics are each scorer's `KEY/score`, and `held_out`.

    A score of which less is better is told with its sign changed.

    Attributes:
      settings: the choices.
      networks: of the stage.
      rewarded: the scorers by key, the held-out reward among them.
      image_shape: of what they score.
    """

    settings: RewardSettings
    networks: Networks
    rewarded: Mapping[str, Rewarded]
    image_shape: tuple[int, int, int]

    needs: ClassVar[tuple[str, ...]] = ("sample", "next_state")
    scores_samples: ClassVar[bool] = True

    def prompt_inputs(self, prompts: Sequence[str]) -> dict[str, Any]:
        """The prompts themselves, as bytes.

        Raises:
          ValueError: a scorer that cannot score images of these prompts, tried on a grey one.
        """
        grey = np.full((1, *self.image_shape), 128, np.uint8)
        for each in self.rewarded.values():
            each.scorer.check(prompts, {})
            each.scores(grey, prompts[:1])
        return {"prompts": to_bytes(prompts)}

    def score_samples(
        self, images: UInt8[np.ndarray, "n h w 3"], inputs: Mapping[str, Any]
    ) -> dict[str, Float[np.ndarray, " n"]]:
        """See `Term`."""
        prompts = from_bytes(inputs["prompts"])
        return {key: each.scores(images, prompts) for key, each in self.rewarded.items()}

    def weigh(self, scores: Mapping[str, Float[Array, " n"]]) -> dict[str, Any]:
        """Equation (3), and the scores."""
        parts = [
            each.weight * losses.standardised(scores[key]) for key, each in self.rewarded.items()
        ]
        return {"advantage": jnp.sum(jnp.stack(parts), axis=0), "scores": dict(scores)}

    def loss(
        self, outputs: StudentOutputs, context: Context
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        """See `Term`."""
        process, s = self.networks.process, jnp.asarray(outputs.next_time)
        drawn = s != process.end
        value = losses.reward_weighted(
            outputs.x0,
            jnp.asarray(outputs.next_state),
            process.alpha(s),
            jnp.where(drawn, process.sigma(s), 1.0),
            drawn * context.inputs["advantage"],
        )  # (2)
        scores = context.inputs["scores"]
        metrics = {
            key if key == _HELD_OUT else f"{key}/score": score for key, score in scores.items()
        }
        return value, metrics

    def should_stop(self, rows: Sequence[Mapping[str, Any]], prefix: str) -> str:
        """Reward hacking: the held-out reward has fallen while a scorer rose."""
        if not self.settings.stop_on_reward_hacking:
            return ""
        keys = [key for key in self.rewarded if key != _HELD_OUT]
        return reward_hacking(rows, prefix, keys, self.settings.tolerance)


def to_bytes(texts: Sequence[str]) -> UInt8[np.ndarray, "n longest"]:
    """Texts in UTF-8, so that they can lie in a batch; the rest of a row is 0."""
    encoded = [text.encode() for text in texts]
    table = np.zeros((len(texts), max(map(len, encoded))), np.uint8)
    for row, line in zip(table, encoded, strict=True):
        row[: len(line)] = np.frombuffer(line, np.uint8)
    return table


def from_bytes(table: UInt8[np.ndarray, "n longest"]) -> list[str]:
    """What `to_bytes` was given."""
    return [row.tobytes().rstrip(b"\0").decode() for row in table]
