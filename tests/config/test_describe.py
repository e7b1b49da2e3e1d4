"""What is said of a student is what its recipe says, whatever the recipe is called."""

import copy
import importlib

import numpy as np
import pytest

from tlcm_jax.config import describe
from tlcm_jax.config.schema import read
from tlcm_jax.io.model_card import model_card

RELEASE = (999, 749, 499, 124)


def recipe(name, variant=""):
    return importlib.import_module(f"configs.{name}").get_config(variant).to_dict()


@pytest.mark.parametrize(
    ("name", "variant", "method", "of_images"),
    [
        ("emoji", "", "TLCM + Hyper-SD", False),
        ("emoji", "paper", "TLCM", False),
        ("emoji", "regression", "TLCM + Hyper-SD + trajectory distillation", False),
        ("emoji_full", "", "TLCM + Hyper-SD + PCM", False),
        ("emoji_full", "paper", "TLCM", False),
        ("emoji_lcm", "", "TLCM + LCM", False),
        ("emoji_pcm", "", "TLCM + PCM", False),
        ("emoji_hyper_sd", "", "TLCM + Hyper-SD", False),
        ("emoji_mcm", "", "MCM", True),
        ("emoji_scott", "", "SCott", True),
        ("emoji_dmd2", "", "DMD2 + TLCM", False),
        ("shapes", "reward", "TLCM + Hyper-SD + RLCM", False),
        ("shapes_full", "stages", "TLCM", False),
        ("shapes_relatives", "tdm", "TDM", False),
        ("shapes_relatives", "decoupled_dmd", "decoupled DMD", False),
        ("sdxl", "", "TLCM", False),
        ("sdxl", "segments", "TLCM + Hyper-SD", False),
        ("sdxl", "paper", "TLCM", False),
    ],
)
def test_methods_and_data_of_the_recipes(name, variant, method, of_images):
    raw = recipe(name, variant)
    raw["name"] = "someone's"  # no name of a recipe says what it is
    settings = read(raw)
    assert describe.method_name(settings) == method
    assert set(describe.methods(settings)) <= set(describe.PAPERS)
    said = describe.data(settings)
    assert said == ("Real images, as latents, and their captions." if of_images else
                    "Prompts alone; no image was read.")  # fmt: skip


PATHS = "states on the teacher's own paths from noise"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("emoji", {"TLCM": [PATHS], "Hyper-SD": ["targets at any time of a segment"]}),
        (
            "emoji_full",
            {
                "TLCM": [
                    PATHS,
                    "latent LPIPS beside the loss",
                    "preference",
                    "distribution matching",
                ],
                "Hyper-SD": ["targets at any time of a segment"],
                "PCM": ["an adversarial term inside the segment"],
            },
        ),
        (
            "emoji_scott",
            {
                "SCott": [
                    "a teacher that steps stochastically",
                    "an adversarial term against the real latents",
                ]
            },
        ),
        (
            "emoji_mcm",
            {
                "MCM": [
                    "jumps to the segment's milestone",
                    "a teacher that steps by adjusted DDIM",
                ]
            },
        ),
        ("emoji_pcm", {"TLCM": [PATHS], "PCM": ["an adversarial term inside the segment"]}),
        (
            "emoji_dmd2",
            {
                "DMD2": ["distribution matching on the student's own rollouts"],
                "TLCM": ["an adversarial term against the student's own samples"],
            },
        ),
        ("emoji_lcm", {"TLCM": [PATHS], "LCM": ["one segment, whose end every state jumps to"]}),
    ],
)
def test_what_is_taken_from_which_method(name, expected):
    assert describe.methods(read(recipe(name))) == expected


def test_a_term_in_the_square_s_place_is_not_said_to_stand_beside_it():
    found = describe.methods(read(recipe("shapes_relatives", "logcd")))["TLCM"]
    assert "latent LPIPS in place of the square" in found
    assert "an adversarial term between prediction and target" in found


def test_adversarial_training_alone_is_not_called_consistency():
    raw = recipe("emoji_dmd2")
    del raw["stages"]["endpoints"]["terms"]["distribution_matching"]
    assert describe.methods(read(raw)) == {
        "TLCM": ["an adversarial term against the student's own samples"]
    }


def test_a_recipe_in_part_of_real_latents_says_which_part():
    raw = recipe("emoji_mcm")
    raw["stages"]["then"] = recipe("emoji", "paper")["stages"]["endpoints"]
    raw["stage_order"] = ["segments", "then"]
    settings = read(raw)
    assert describe.data(settings) == (
        "Real images, as latents, and their captions in segments; prompts alone in the other "
        "stages."
    )
    assert describe.method_name(settings) == "MCM + TLCM"


def test_lcm_of_noised_images_is_lcm_alone():
    raw = recipe("emoji_lcm")
    raw["latents"] = "latents.npz"
    raw["stages"]["segments"]["settings"]["mode"] = "data"
    assert describe.method_name(read(raw)) == "LCM"


def test_times_are_those_that_the_student_was_trained_at():
    assert describe.sampling_times(read(recipe("emoji")))[4] == RELEASE
    tlcm = describe.sampling_times(read(recipe("emoji", "paper")))
    assert tlcm[4] == RELEASE and len(tlcm) == 8
    dmd2 = describe.sampling_times(read(recipe("emoji_dmd2")))
    assert dmd2 == {1: (999,), 2: (999, 499), 3: (999, 749, 499), 4: (999, 749, 499, 249)}
    # Visited states lie at the rollout's own times.
    tdm = describe.sampling_times(read(recipe("shapes_relatives", "tdm")))
    assert tdm == {1: (999,), 2: (999, 499), 3: (999, 499, 124), 4: RELEASE}
    raw = recipe("emoji", "paper")
    del raw["stages"]["segments"], raw["stage_order"]
    assert describe.sampling_times(read(raw))[4] == RELEASE  # eight milestones have it
    raw["stages"]["endpoints"]["settings"]["segments"] = 5
    five = describe.sampling_times(read(raw))
    assert (
        five[4] == (999, 799, 599, 399) and five[2] == (999, 599) and list(five) == [1, 2, 3, 4, 5]
    )


def test_noise_and_guidance_are_the_recipe_s():
    mcm = read(recipe("emoji_mcm"))
    assert describe.gamma(mcm) == 0.0 and describe.gamma(read(recipe("sdxl"))) == 1.0
    raw = recipe("emoji_dmd2")
    assert describe.guidance_scales(read(raw)) == (5.0,)  # of the term: no teacher walks
    raw["stages"]["endpoints"]["settings"] |= {"weight": 1.0, "guidance_scale": 3.0}
    assert describe.guidance_scales(read(raw)) == (3.0, 5.0)


def test_stage_lines_have_every_setting_and_no_path():
    raw = recipe("emoji_full")
    settings = read(raw)
    lines = describe.stage_lines(settings)
    assert [line.split(":")[0] for line in lines] == list(settings.stages)
    last, stage = lines[-1], settings.stages["matching"]
    assert f"guidance_scale = {stage.settings.guidance_scale:g}" in last
    assert f"learning_rate = {stage.learning_rate:g}" in last
    for term, chosen in stage.terms.items():
        assert f"with {term}(weight = {chosen.weight:g}" in last
    assert "latent_lpips" in last and "/" not in "".join(lines)
    changed = copy.deepcopy(raw)
    changed["stages"]["matching"]["settings"]["guidance_scale"] = 2.75
    assert "guidance_scale = 2.75" in describe.stage_lines(read(changed))[-1]


def test_training_texts_are_prompts_or_captions_or_both(tmp_path):
    raw = recipe("emoji_mcm")
    prompts, latents = tmp_path / "prompts.txt", tmp_path / "latents.npz"
    prompts.write_text("a cat\na dog\n")
    np.savez(latents, latents=np.zeros((1, 8, 8, 4)), captions=np.array(["a sun"]))
    raw |= {"prompts": [str(prompts)], "latents": str(latents)}
    assert describe.training_texts(read(raw)) == {"a sun"}
    raw["stages"]["then"] = recipe("emoji", "paper")["stages"]["endpoints"]
    raw["stage_order"] = ["segments", "then"]
    assert describe.training_texts(read(raw)) == {"a sun", "a cat", "a dog"}
    plain = recipe("emoji") | {"prompts": [str(prompts)]}
    assert describe.training_texts(read(plain)) == {"a cat", "a dog"}


class Teacher:
    """What a card reads of a teacher."""

    source = folder = "someone/tiny"
    backbone = "unet"


@pytest.mark.parametrize(
    ("name", "says", "not_says"),
    [
        (
            "emoji_mcm",
            ("by MCM\n", "tags: [text-to-image, distillation, mcm]", "EulerDiscreteScheduler",
             'timestep_spacing="leading"', "- Data: Real images", "arXiv 2403.06807",
             "the teacher's, scale 5, is distilled in"),
            ("no image", "LCMScheduler", "TLCM"),
        ),
        (
            "emoji_dmd2",
            ("distilled to 1 to 4 steps by DMD2 + TLCM", "| 4 | 999, 749, 499, 249 |",
             "timesteps=[999, 749, 499, 249]", "LCMScheduler", "arXiv 2405.14867"),
            ("124", "| 5 |"),
        ),
        (
            "sdxl",
            ("a LoRA of rank 64, alpha 8, on", "| 8 | 999, 874", "A LoRA of rank 64 in diffusers'",
             "timesteps=[999, 749, 499, 124],", "- Method: TLCM\n",
             "1. `segments: mlcd(", "4. `matching: lcd(",
             "scale 8, is distilled in",
             "- Data: Prompts alone; no image was read."),
            ("MCM", "Euler"),
        ),
    ],
)  # fmt: skip
def test_cards(name, says, not_says):
    card = model_card(describe.student_recipe(read(recipe(name)), Teacher), "lora")
    for text in says:
        assert text in card
    for text in not_says:
        assert text not in card
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")


def test_a_card_of_weights_trained_whole_has_no_rank():
    raw = recipe("sdxl") | {"trainable": "full", "export": ["pipeline"]}
    made = describe.student_recipe(read(raw), Teacher)
    assert made.rank == 0 and made.trained == "all weights of the unet"


def test_a_card_of_some_fresh_noise_names_tcd():
    raw = recipe("emoji")
    raw["evaluation"]["gamma"] = 0.3
    card = model_card(describe.student_recipe(read(raw), Teacher), "pipeline")
    assert "TCDScheduler.from_config(pipe.scheduler.config)" in card and "eta=0.3," in card
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")


def test_the_card_says_the_size_and_passes_it():
    raw = recipe("emoji")
    card = model_card(describe.student_recipe(read(raw), Teacher), "lora")
    assert "- Images: of the teacher's own size" in card and "height=" not in card
    raw["model"]["resolution"] = "1216x832"
    card = model_card(describe.student_recipe(read(raw), Teacher), "lora")
    assert "- Images: 1216x832, width x height in pixels" in card
    assert "manual_seed(0), height=832, width=1216,\n" in card
    raw["model"]["buckets"] = {"1024x1024": 3.0, "1216x832": 1.0}
    card = model_card(describe.student_recipe(read(raw), Teacher), "lora")
    assert "of several sizes, width x height in pixels: 1024x1024 (75%), 1216x832 (25%)" in card
