"""The objectives and terms that a recipe can name. A new one is a file and a line here."""

from tlcm_jax.distillation.lcd import LCDSettings
from tlcm_jax.distillation.mlcd import MLCDSettings
from tlcm_jax.distillation.terms.adversarial import AdversarialSettings
from tlcm_jax.distillation.terms.distribution_matching import DistributionMatchingSettings
from tlcm_jax.distillation.terms.latent_lpips import LatentLPIPSSettings
from tlcm_jax.distillation.terms.preference import PreferenceSettings
from tlcm_jax.distillation.terms.reward import RewardSettings
from tlcm_jax.distillation.trajectory_kd import TrajectoryKDSettings

OBJECTIVES = {
    "mlcd": MLCDSettings,
    "lcd": LCDSettings,
    "trajectory_kd": TrajectoryKDSettings,
}
TERMS = {
    "latent_lpips": LatentLPIPSSettings,
    "preference": PreferenceSettings,
    "reward": RewardSettings,
    "distribution_matching": DistributionMatchingSettings,
    "adversarial": AdversarialSettings,
}
