"""The adversarial term: one step of the student is to look like what it is held against.

Real and fake are re-noised to a common time t', and a discriminator D on the teacher's own
features (the down and middle half of its network with an adapter psi, and small heads) tells them
apart: with s = D(re-noised, t', c) averaged over heads and pixels, and h the hinge or softplus,

    L_D = h(1 - s_real) + h(1 + s_fake)   or   softplus(-s_real) + softplus(s_fake),     (1)
    L_G = -s_fake                         or   softplus(-s_fake).                        (2)

TLCM's last stage: fake is the prediction x at a milestone, real the student's own sample of
several steps; or, where states are made of real latents, these (SCott, Liu et al. 2024, arXiv
2403.01505). Inside a phase (PCM, Wang et al. 2024, arXiv 2405.18407): fake is where the
student's jump ends, real the consistency loss's target, both at the phase's lower milestone b,
and noise is added from there, to a time t' >= b (`renoising.py`, equation 1). The times 10, 250,
500, 750 are SDXL-Lightning's (Lin et al. 2024, arXiv 2402.13929).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num, PRNGKeyArray

from tlcm_jax.diffusion.sampling import normal
from tlcm_jax.distillation import losses
from tlcm_jax.distillation.checks import check_at_least, check_at_most, check_choice
from tlcm_jax.distillation.networks import (
    AuxNetwork,
    Frozen,
    Networks,
    Params,
    adapted_features,
    init_adapter,
)
from tlcm_jax.distillation.objective import NFE, repeat, split
from tlcm_jax.distillation.terms.base import AuxSettings, Context, StudentOutputs, Term
from tlcm_jax.distillation.terms.renoising import diffused
from tlcm_jax.families.base import LatentModel
from tlcm_jax.models.discriminator import Heads, choose_layers
from tlcm_jax.models.lora import LoRAConfig

DISCRIMINATOR = "discriminator"
# (z, t, conditioning) -> maps of logits.
Discriminator = Callable[[Array, Array, object], Sequence[Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialSettings(AuxSettings):
    """The choices of the term.

    Attributes:
      weight: beside the consistency loss; ours is 5e-3 beside distribution matching, 0.1 without.
      loss: "hinge" or "softplus".
      real: "sample", the student's own of several steps, or a real one where the objective's
        states are made of real ones; or "target", the consistency target.
      times: how far above the compared latents' own time t' lies, in training steps, one of these
        at random.
      layers: the network's blocks that heads look at, such as "down_blocks.1" and "mid_block";
        none takes all.
      aux_learning_rate: of the discriminator; 1e-4 in the paper.
    """

    weight: float = 5e-3
    loss: str = "hinge"
    real: str = "sample"
    times: tuple[int, ...] = (10, 250, 500, 750)
    layers: tuple[str, ...] = ()
    aux_learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss", self.loss, ("hinge", "softplus"))
        check_choice("real", self.real, ("sample", "target"))
        check_at_least("the number of times", len(self.times), 1)
        check_at_least("the smallest of times", min(self.times), 0)

    def load(self, model: LatentModel, networks: Networks, adapter: LoRAConfig) -> "Adversarial":
        """See `TermSettings`: the discriminator is an adapter and heads on the model's features."""
        total = networks.process.num_train_timesteps
        reason = f"the last time of {total}"
        check_at_most("the largest of times", max(self.times), total - 1, reason)
        widths = model.feature_widths
        layers = choose_layers(self.layers, widths)
        heads = Heads(layers, model.norm_groups, model.dtype)

        def init(key: PRNGKeyArray) -> Params:
            adapter_key, head_key = jax.random.split(key)
            # An adapter that no state depends on would never move.
            below = {
                name: leaves
                for name, leaves in init_adapter(model, adapter, adapter_key).items()
                if not name.startswith(model.unused_by_features)
            }
            maps = {layer: jnp.zeros((1, 1, 1, widths[layer])) for layer in layers}
            return {"adapter": below, "heads": heads.init(head_key, maps)["params"]}

        def discriminator(psi: Params, frozen: Frozen) -> Discriminator:
            features = adapted_features(model, adapter, psi["adapter"], frozen)
            return lambda z, t, conditioning: heads.apply(
                {"params": psi["heads"]}, features(z, t, conditioning)
            )

        return Adversarial(
            weight=self.weight,
            settings=self,
            networks=networks,
            init=init,
            discriminator=discriminator,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adversarial(Term):
    """Equations (1) and (2); the discriminator's metrics are s_real and s_fake.

    Attributes:
      settings: the choices.
      networks: of the stage.
      init: `(key) -> psi`.
      discriminator: `(psi, frozen)` to the network.
    """

    settings: AdversarialSettings
    networks: Networks
    init: Callable[[PRNGKeyArray], Params]
    discriminator: Callable[[Params, Frozen], Discriminator]

    @property
    def needed_outputs(self) -> tuple[str, ...]:
        """See `Term`."""
        return (self.settings.real,)

    @property
    def aux(self) -> AuxNetwork:
        """The discriminator."""
        return AuxNetwork(
            name=DISCRIMINATOR,
            init=self.init,
            loss=self._discriminator_loss,
            updates=self.settings.aux_updates,
            learning_rate=self.settings.aux_learning_rate,
            b1=0.0,
        )

    @property
    def nfe(self) -> NFE:
        """See `Term`; a half of a network is counted as a whole."""
        return NFE(aux=1.0 + 2.0 * self.settings.aux_updates)

    def loss(
        self, outputs: StudentOutputs, context: Context
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        """See `Term`."""
        time_keys, noise_keys = split(context.keys, 2)
        fake, _, level = self._compared(outputs)
        t = self._times(level, time_keys)
        z = self._diffused(fake, level, t, noise_keys)
        discriminator = self.discriminator(context.aux_params[DISCRIMINATOR], context.frozen)
        maps = discriminator(z, t, outputs.conditioning)
        return losses.generator_loss(maps, self.settings.loss), {}  # (2)

    def _discriminator_loss(
        self, psi: Params, frozen: Frozen, outputs: StudentOutputs, keys: Key[Array, " n"]
    ) -> tuple[Float[Array, " n"], dict[str, Array]]:
        """Equation (1)."""
        time_keys, real_keys, fake_keys = split(keys, 3)
        fake, real, level = self._compared(outputs)
        t = self._times(level, time_keys)
        noisy = (
            self._diffused(real, level, t, real_keys),
            self._diffused(fake, level, t, fake_keys),
        )
        # Real and fake of a sample side by side, so that each stays on its own device.
        z = jnp.stack(noisy, axis=1).reshape(-1, *fake.shape[1:])
        maps = self.discriminator(psi, frozen)(z, jnp.repeat(t, 2), repeat(outputs.conditioning, 2))
        real_maps, fake_maps = [m[0::2] for m in maps], [m[1::2] for m in maps]
        metrics = {
            "real": losses.mean_logit(real_maps, lambda s: s),
            "fake": losses.mean_logit(fake_maps, lambda s: s),
        }
        return losses.discriminator_loss(real_maps, fake_maps, self.settings.loss), metrics

    def _compared(self, outputs: StudentOutputs) -> tuple[Any, Any, Num[Array, " n"]]:
        """Fake, real, and the time of both."""
        clean = jnp.full_like(outputs.target_time, self.networks.process.end)
        if self.settings.real == "sample":
            # Whole samples are clean, wherever the student's jump ends.
            return outputs.x0, outputs.sample, clean
        return outputs.jump, outputs.target, outputs.target_time

    def _times(self, level: Num[Array, " n"], keys: Key[Array, " n"]) -> Num[Array, " n"]:
        above = jnp.asarray(self.settings.times)
        chosen = jax.vmap(lambda key: jax.random.choice(key, above))(keys)
        return self.networks.process.earlier(level, -chosen)

    def _diffused(
        self,
        z: Float[Array, " n *latent"],
        level: Num[Array, " n"],
        t: Num[Array, " n"],
        keys: Key[Array, " n"],
    ) -> Float[Array, " n *latent"]:
        return diffused(self.networks.process, z, level, t, normal(keys, z.shape[1:]))
