"""The flags that say which model is drawn with, for the commands that draw with one."""

from absl import flags

# They are the flags of the command that defines them, and stand in its --help.
flags.disclaim_key_flags()


def define_model_flags(values: flags.FlagValues) -> None:
    """Defines `--model`, `--lora`, `--vae` and `--adapter` in `values`."""
    where = {"flag_values": values}
    flags.DEFINE_string("model", None, "Folder, file, hub id or workdir.", required=True, **where)
    flags.DEFINE_multi_string(
        "lora", None, "LoRA to put onto the model: PATH or hub id, [:WEIGHT].", **where
    )
    flags.DEFINE_string("vae", None, "Another autoencoder: folder, file or hub id.", **where)
    flags.DEFINE_string(
        "adapter", None, "Folder of another language's text encoder and its adapter.", **where
    )
