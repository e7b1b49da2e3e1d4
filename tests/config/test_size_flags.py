"""The size of images on the command line."""

import pytest
from absl import flags
from PIL import Image

from tests.support.tiny_pipeline import write_tiny_pipeline
from tlcm_jax import evaluate, export, plan, sample, serve
from tlcm_jax.config.size_flags import given_size


def parsed(command, *arguments):
    values = flags.FlagValues()
    command.define_flags(values)
    values(["command", *arguments], known_only=True)
    return values


MUST = {
    sample: ("--model=m", "--prompt=p"),
    evaluate: ("--model=m", "--prompts=p", "--output=o"),
    export: ("--workdir=w", "--output=o"),
    plan: ("--config=configs/sdxl.py", "--topology=h100:2"),
}


@pytest.mark.parametrize("command", MUST, ids=lambda command: command.__name__)
def test_every_command_takes_height_and_width_or_both_at_once(command):
    def size(*arguments):
        return given_size(parsed(command, *MUST[command], *arguments))

    assert size() is None
    wide = size("--resolution=1216x832")
    assert (wide.height, wide.width) == (832, 1216)
    assert size("--height=832", "--width=1216") == wide
    assert size("--resolution=64") == size("--height=64", "--width=64")


@pytest.mark.parametrize("command", [*MUST, serve], ids=lambda command: command.__name__)
def test_flags_that_commands_share_stand_in_the_help_of_each(command):
    values = flags.FlagValues()
    command.define_flags(values)
    shown = {flag.name for flag in values.get_key_flags_for_module(command.__name__)}
    assert set(values) - {"help", "helpshort", "helpfull", "helpxml"} <= shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height=48"], "give --height and --width"),
        (["--width=48"], "give --height and --width"),
        (["--height=48", "--width=48", "--resolution=48"], "or --resolution WIDTHxHEIGHT"),
        (["--resolution=48,32"], "--resolution '48,32': give WIDTHxHEIGHT"),
    ],
)
def test_half_a_size_or_two_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        given_size(parsed(sample, *MUST[sample], *arguments))


def test_sample_draws_what_is_asked_for(tmp_path):
    model = write_tiny_pipeline(tmp_path / "tiny")
    given = (f"--model={model}", "--prompt=a cat", "--steps=1", f"--output={tmp_path / 'x.png'}")
    sample.run(parsed(sample, *given, "--height=48", "--width=32"))
    assert Image.open(tmp_path / "x.png").size == (32, 48)
    with pytest.raises(ValueError, match="resolution 50x32 must .* the nearest is 52x32"):
        sample.run(parsed(sample, *given, "--resolution=50x32"))
