"""The layers of latent-diffusion's UNet, counted out as its own constructor makes them.

That is how ComfyUI, A1111, Forge and sd-scripts know SD 1.x and SDXL, whatever a file was trained
with. Shapes are PyTorch's; norms are left out, since no LoRA adapts them.
"""

import dataclasses

CHANNELS, EMBEDDING = 320, 1280


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ldm:
    """What a checkpoint's constructor is called with.

    Attributes:
      multipliers: of the channels, by level.
      depths: transformer blocks after each residual block, by level; 0 for none.
      middle: transformer blocks in the middle.
      context: width of the text's states.
      linear: whether projections are linear layers or 1x1 convolutions.
      labels: width of the vector conditioning; 0 for none.
    """

    multipliers: tuple[int, ...]
    depths: tuple[int, ...]
    middle: int
    context: int
    linear: bool
    labels: int = 0


SDXL = Ldm(
    multipliers=(1, 2, 4), depths=(0, 2, 10), middle=10, context=2048, linear=True, labels=2816
)
SD15 = Ldm(multipliers=(1, 2, 4, 4), depths=(1, 1, 1, 0), middle=1, context=768, linear=False)

# The classes that sd-scripts puts LoRAs into.
RESNET, TRANSFORMER, DOWN, UP = "ResnetBlock2D", "Transformer2DModel", "Downsample2D", "Upsample2D"


def layers(ldm: Ldm) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Class of the module that it lies in ("" for none) and shape of every layer's weight."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}

    def resnet(name: str, before: int, after: int) -> None:
        found[f"{name}.in_layers.2"] = (RESNET, (after, before, 3, 3))
        found[f"{name}.emb_layers.1"] = (RESNET, (after, EMBEDDING))
        found[f"{name}.out_layers.3"] = (RESNET, (after, after, 3, 3))
        if before != after:
            found[f"{name}.skip_connection"] = (RESNET, (after, before, 1, 1))

    def transformer(name: str, width: int, depth: int) -> None:
        kernel = (width, width) if ldm.linear else (width, width, 1, 1)
        found[f"{name}.proj_in"] = found[f"{name}.proj_out"] = (TRANSFORMER, kernel)
        for block in (f"{name}.transformer_blocks.{i}" for i in range(depth)):
            for attention, inputs in (("attn1", width), ("attn2", ldm.context)):
                for leaf, shape in (
                    ("to_q", (width, width)),
                    ("to_k", (width, inputs)),
                    ("to_v", (width, inputs)),
                    ("to_out.0", (width, width)),
                ):
                    found[f"{block}.{attention}.{leaf}"] = (TRANSFORMER, shape)
            found[f"{block}.ff.net.0.proj"] = (TRANSFORMER, (8 * width, width))
            found[f"{block}.ff.net.2"] = (TRANSFORMER, (width, 4 * width))

    found["time_embed.0"] = ("", (EMBEDDING, CHANNELS))
    found["time_embed.2"] = ("", (EMBEDDING, EMBEDDING))
    if ldm.labels:
        found["label_emb.0.0"] = ("", (EMBEDDING, ldm.labels))
        found["label_emb.0.2"] = ("", (EMBEDDING, EMBEDDING))
    found["input_blocks.0.0"] = ("", (CHANNELS, 4, 3, 3))
    width, skips, block = CHANNELS, [CHANNELS], 1
    last = len(ldm.multipliers) - 1
    for level, (multiplier, depth) in enumerate(zip(ldm.multipliers, ldm.depths, strict=True)):
        for _ in range(2):
            resnet(f"input_blocks.{block}.0", width, width := CHANNELS * multiplier)
            if depth:
                transformer(f"input_blocks.{block}.1", width, depth)
            skips.append(width)
            block += 1
        if level < last:
            found[f"input_blocks.{block}.0.op"] = (DOWN, (width, width, 3, 3))
            skips.append(width)
            block += 1
    resnet("middle_block.0", width, width)
    transformer("middle_block.1", width, ldm.middle)
    resnet("middle_block.2", width, width)
    block = 0
    for level in range(last, -1, -1):
        for i in range(3):
            inputs = width + skips.pop()
            resnet(f"output_blocks.{block}.0", inputs, width := CHANNELS * ldm.multipliers[level])
            place = 1
            if ldm.depths[level]:
                transformer(f"output_blocks.{block}.1", width, ldm.depths[level])
                place = 2
            if level and i == 2:
                found[f"output_blocks.{block}.{place}.conv"] = (UP, (width, width, 3, 3))
            block += 1
    found["out.2"] = ("", (4, CHANNELS, 3, 3))
    return found
