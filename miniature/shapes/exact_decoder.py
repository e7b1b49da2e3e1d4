"""The linear codec's way back, written exactly into the decoder of an `AutoencoderKL`.

Nearest-neighbour upsampling gives the four new pixels of a cell the same value, and a 3 x 3
convolution cannot tell them apart. What can is gating by parity: beside a large penalty M,

    silu(x - M p) - silu(-x - M p) = x where p = 0, and 0 where p >= 1,          (1)

so a copy of x for each parity, added up by the next layer, is a depth-to-space. Parity itself
comes from a ramp r(i) = i + 1 that is upsampled with the picture: its differences r(i) - r(i - 1)
are 1 at even places and 0 at odd ones, with the zeros of the padding included, and
r(i) + r(i - 1) is the ramp of the finer grid. The first ramp is made of the picture's own border,
which zero padding shows, handed on one pixel a convolution. All of these are whole numbers, exact
in fp16 weights and fp32 arithmetic (so the decoder asks for `force_upcast`). The two signs of a
number share a group, whose mean they leave alone.

The group norms see the same constants in every picture: each is given the scale and bias that
undo it, and what fp16 rounds off there is put right in the bias before it.

Levels: 24 latents -> 24 numbers for each 4 x 4 pixels -> 12 for 2 x 2 -> 3.
"""

import numpy as np

from miniature.shapes.codec import CHANNELS, LinearCodec

GROUPS = 8
_M16, _M32, _M64 = 512.0, 64.0, 64.0  # penalties: powers of two above what they hide
_CONSTANT = 1024.0
_EPSILON = 1e-6


def _half(x: np.ndarray | float) -> np.ndarray:
    return np.asarray(x, np.float64).astype(np.float16).astype(np.float64)


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-np.clip(x, -500, 500)))


def _spread(count: int, width: int, groups: int = GROUPS) -> np.ndarray:
    """Places of `count` channels dealt out to the groups of a layer, as evenly as can be."""
    size, each = width // groups, -(-count // groups)
    places = [g * size + i for g in range(groups) for i in range(each)]
    return np.asarray(places[:count])


def _undo_norm(norm: dict, static: np.ndarray, groups: int = GROUPS) -> np.ndarray:
    """Gives a group norm the scale and bias that undo it on `static` `[h, w, c]`.

    Returns:
      `[c]`: what fp16 leaves over where a channel is 0 (to be taken off before the norm).
    """
    height, width, channels = static.shape
    cut = static.reshape(height * width, groups, -1)
    mean, deviation = cut.mean((0, 2)), np.sqrt(cut.var((0, 2)) + _EPSILON)
    size = channels // groups
    scale, bias = _half(deviation), _half(mean)
    norm["scale"][:], norm["bias"][:] = np.repeat(scale, size), np.repeat(bias, size)
    return np.repeat(bias - mean * scale / deviation, size)


def _gates(conv: dict, ramps: tuple[int, ...], side: int, penalty: float, gate: list) -> None:
    """Penalties of an upsampler's convolution.

    Args:
      conv: its parameters.
      ramps: input channels (one, row ramp, column ramp).
      side: of the coarse grid.
      penalty: M.
      gate: (output channel, row parity or None, column parity or None) that it is open at.
    """
    kernel = conv["kernel"]
    for channel, *parities in gate:
        for axis, parity in enumerate(parities):
            if parity is None:
                continue

            def tap(offset: int, source: int, weight: float, axis: int = axis) -> None:
                place = (1 + offset, 1) if axis == 0 else (1, 1 + offset)
                kernel[(*place, source, channel)] -= penalty * weight  # noqa: B023

            ramp = ramps[1 + axis]
            if parity == 1:  # closed at even places: r(i) - r(i - 1)
                tap(0, ramp, 1)
                tap(-1, ramp, -1)
            else:  # closed at odd places: the same from the far edge, r - side - 1
                for offset, sign in ((1, 1), (0, -1)):
                    tap(offset, ramp, sign)
                    tap(offset, ramps[0], -sign * (side + 1))


def _finer(conv: dict, ramps: tuple[int, ...], outputs: tuple[int, ...]) -> None:
    """The finer grid's one and ramps, in an upsampler's convolution."""
    kernel = conv["kernel"]
    kernel[1, 1, ramps[0], outputs[0]] = 1
    for axis in (0, 1):
        for offset in (0, -1):
            place = (1 + offset, 1) if axis == 0 else (1, 1 + offset)
            kernel[(*place, ramps[1 + axis], outputs[1 + axis])] = 1


def _ramps(side: int) -> np.ndarray:
    """One, row ramp and column ramp, `[side, side, 3]`."""
    line = np.arange(1, side + 1)
    one = np.ones((side, side))
    return np.stack([one, one * line[:, None], one * line[None, :]], axis=-1)


def _closed(side: int, gate: list, penalty: float, channels: int) -> np.ndarray:
    """The static part of gated channels, `[side, side, channels]`."""
    static = np.zeros((side, side, channels))
    parity = np.arange(side) % 2
    for channel, row, column in gate:
        if row is not None:
            static[:, :, channel] -= penalty * (parity != row)[:, None]
        if column is not None:
            static[:, :, channel] -= penalty * (parity != column)[None, :]
    return static


def _first_ramps(params: dict, ramps: tuple[int, ...], lines: int) -> None:
    """One and the ramps at 8 x 8 from the border, by the middle block's two resnets.

    d_k is 1 in the k-th line from a border. The first convolution sees d_0 in its padding, each
    later one moves it on, and the ramp is a sum of four lines from either side. Lines lie in a
    group of their own: four, their negatives, and constants that make its mean 0 and its variance
    1, so that the norm needs no rounded scale; silu(d) - silu(-d) = d.
    """
    # (axis, direction in which the line moves) of top, bottom, left, right.
    borders = ((0, 1), (0, -1), (1, 1), (1, -1))
    constants = np.array([2, -2, 1.5, -1.5, 0.5, -0.5])  # 8 lines of mean square 1/8 and these: 14
    fill = slice(lines + 8, lines + 14)
    params["conv_in"]["bias"][fill] = constants
    for step in (0, 1):
        for name in ("norm1", "norm2"):
            scale = params["mid_block"][f"resnets.{step}"][name]["scale"]
            scale[lines : lines + 14] = 1
        params["mid_block"][f"resnets.{step}"]["conv1"]["bias"][fill] = constants

    def place(axis: int, offset: int) -> tuple[int, int]:
        return (1 + offset, 1) if axis == 0 else (1, 1 + offset)

    # The seed: after norm and SiLU a constant, whose difference to the padding shall be 1.
    seed = lines - 1
    norm = params["mid_block"]["resnets.0"]["norm1"]
    norm["scale"][seed], norm["bias"][seed] = 0, 1
    first = params["mid_block"]["resnets.0"]["conv1"]["kernel"]
    level = float(_silu(np.float64(1)))
    for i, (axis, direction) in enumerate(borders):
        for sign, channel in ((1, lines + i), (-1, lines + 4 + i)):
            first[(*place(axis, 0), seed, channel)] = sign / level
            first[(*place(axis, -direction), seed, channel)] = -sign / level
    for step in (0, 1):
        resnet = params["mid_block"][f"resnets.{step}"]
        first, second = resnet["conv1"]["kernel"], resnet["conv2"]["kernel"]
        for i, (axis, direction) in enumerate(borders):
            for sign, source in ((1, lines + i), (-1, lines + 4 + i)):
                moved = place(axis, -direction)
                if step == 1:
                    for other, target in ((1, lines + i), (-1, lines + 4 + i)):
                        first[(*moved, source, target)] = sign * other
                for k, offset in ((2 * step, 0), (2 * step + 1, -direction)):
                    at = (*place(axis, offset), source)
                    second[(*at, ramps[1 + axis])] += sign * (k + 1 if direction == 1 else 8 - k)
                    if axis == 0:  # the rows' lines together are everywhere once
                        second[(*at, ramps[0])] += sign
                if step == 0:
                    for other, target in ((1, lines + i), (-1, lines + 4 + i)):
                        second[(*moved, source, target)] = sign * other


def _normed(static: np.ndarray, norm: dict) -> np.ndarray:
    """The group norm's output on `static`."""
    cut = static.reshape(*static.shape[:2], GROUPS, -1)
    mean = cut.mean((0, 1, 3), keepdims=True)
    unit = (cut - mean) / np.sqrt(cut.var((0, 1, 3), keepdims=True) + _EPSILON)
    return unit.reshape(static.shape) * _half(norm["scale"]) + _half(norm["bias"])


def exact_decoder(shapes: dict, codec: LinearCodec) -> dict:
    """The decoder's parameters, for `block_out_channels` (32, 48, 104, 112).

    Args:
      shapes: any parameters of such a decoder.
      codec: whose `decode` it computes (but for its clip, and to about 1 % of a grey level where
        24 numbers do not hold a 4 x 4 patch).
    """
    params = _zeros(shapes)
    # ---- 8 x 8: latents in the first two groups, static channels in the third, apart from data.
    ramps = (28, 29, 30)  # one, row, column
    for channel in range(CHANNELS):
        params["conv_in"]["kernel"][1, 1, channel, channel] = 1
    _first_ramps(params, ramps, lines=42)

    # ---- to 16 x 16. y = P^T (4 x 4 patch), for each of the four patches of a latent's block.
    inverse = codec.inverse.astype(np.float64).reshape(CHANNELS, 2, 4, 2, 4, 3)
    patches = inverse.transpose(1, 3, 0, 2, 4, 5).reshape(2, 2, CHANNELS, 48)
    stacked = patches.reshape(-1, 48)
    basis = np.linalg.eigh(stacked.T @ stacked)[1][:, ::-1][:, :24]  # [48, 24]
    towards = patches @ basis  # [2, 2, latents, 24]
    up = params["up_blocks.0"]["upsamplers.0"]["conv"]
    # Seven groups for the copies; the static channels keep the eighth apart from data, for an
    # error of theirs would be multiplied by M.
    gated = np.arange(96).reshape(2, CHANNELS, 2).transpose(0, 2, 1)  # row parity, sign, latent
    one, row, column, parity = range(98, 102)
    gate = []
    for a in (0, 1):
        for s, sign in enumerate((1, -1)):
            for c in range(CHANNELS):
                up["kernel"][1, 1, c, gated[a, s, c]] = sign
                gate.append((gated[a, s, c], a, None))
    _gates(up, ramps, 8, _M16, gate)
    _finer(up, ramps, (one, row, column))
    for offset, sign in ((0, 1), (-1, -1)):  # 1 at even columns
        up["kernel"][1, 1 + offset, ramps[2], parity] = sign
    static = _closed(16, gate, _M16, 112)
    static[..., [one, row, column]] = _ramps(16)
    static[..., parity] = (np.arange(16) % 2 == 0)[None, :]

    resnet = params["up_blocks.1"]["resnets.0"]
    left = _undo_norm(resnet["norm1"], static)
    up["bias"][gated.ravel()] -= left[gated.ravel()]
    seen = _silu(_normed(static - left * np.isin(np.arange(112), gated), resnet["norm1"]))
    even, odd, level = seen[0, 0, parity], seen[0, 1, parity], seen[0, 0, one]
    hidden = _spread(96, 104).reshape(2, 24, 2).transpose(0, 2, 1)  # column parity, sign, number
    first = resnet["conv1"]["kernel"]
    gate = [(hidden[b, s, k], None, b) for b in (0, 1) for s in (0, 1) for k in range(24)]
    for b in (0, 1):
        for s, sign in enumerate((1, -1)):
            for a in (0, 1):
                for t, half in enumerate((1, -1)):
                    rows = np.ix_(gated[a, t], hidden[b, s])
                    first[1, 1][rows] = sign * half * towards[a, b]
    norm_static = _closed(16, gate, _M16, 104)
    left = _undo_norm(resnet["norm2"], norm_static)
    for channel, _, b in gate:
        # Open at parity b: weight * seen + bias = 0 there, -M at the other.
        open_at, shut_at = (even, odd) if b == 0 else (odd, even)
        weight = _half(_M16 / (open_at - shut_at))
        bias = _half(-weight * open_at)
        first[1, 1, parity, channel] = weight
        resnet["conv1"]["bias"][channel] = bias
        # What both roundings leave, and the norm's, is taken off in small numbers.
        over = weight * open_at + bias + left[channel]
        first[1, 1, one, channel] = -over / level
    for s, sign in enumerate((1, -1)):
        for b in (0, 1):
            for k in range(24):
                resnet["conv2"]["kernel"][1, 1, hidden[b, s, k], k] = sign
    content, ramps16 = 24, (24, 25, 26)
    for source, target in zip((one, row, column), ramps16, strict=True):
        resnet["conv_shortcut"]["kernel"][0, 0, source, target] = 1

    # ---- to 32 x 32: 24 numbers to 12, a copy for each of the four places.
    up = params["up_blocks.1"]["upsamplers.0"]["conv"]
    quarter = basis.T.reshape(content, 2, 2, 2, 2, 3).transpose(1, 3, 0, 2, 4, 5)
    quarter = quarter.reshape(2, 2, content, 12)
    gated, ramps32 = _four(up, quarter, 104, ramps16, 16, _M32)
    _finer(up, ramps16, ramps32)
    gate = _four_gates(gated)
    static = _closed(32, gate, _M32, 104)
    static[..., ramps32] = _ramps(32)
    resnet = params["up_blocks.2"]["resnets.0"]
    left = _undo_norm(resnet["norm1"], static)
    up["bias"][gated.ravel()] -= left[gated.ravel()]
    # Twelve numbers in pairs of either sign, four to a group beside two constants.
    pairs = np.array([[6 * g + i, 6 * g + 2 + i] for g in range(6) for i in (0, 1)])
    static = np.zeros((32, 32, 48))
    for g in range(8):
        for i, sign in ((4, 1), (5, -1)):
            resnet["conv1"]["bias"][6 * g + i] = sign * _CONSTANT
            static[..., 6 * g + i] = sign * _CONSTANT
    for k in range(12):
        for a in (0, 1):
            for b in (0, 1):
                for s, sign in enumerate((1, -1)):
                    for t, other in enumerate((1, -1)):
                        kernel = resnet["conv1"]["kernel"]
                        kernel[1, 1, gated[a, b, s, k], pairs[k, t]] = sign * other
        resnet["conv2"]["kernel"][1, 1, pairs[k, 0], k] = 1
        resnet["conv2"]["kernel"][1, 1, pairs[k, 1], k] = -1
    _undo_norm(resnet["norm2"], static)
    fine = (12, 13, 14)
    for source, target in zip(ramps32, fine, strict=True):
        resnet["conv_shortcut"]["kernel"][0, 0, source, target] = 1

    # ---- to 64 x 64: the last norm and SiLU are the gate.
    up = params["up_blocks.2"]["upsamplers.0"]["conv"]
    pixel = np.eye(12).reshape(12, 2, 2, 3).transpose(1, 2, 0, 3)
    gated, _ = _four(up, pixel, 48, fine, 32, _M64, groups=1)
    places = np.arange(24).reshape(2, 2, 3, 2).transpose(0, 1, 3, 2)  # pairs in one group
    static = _closed(64, _four_gates(places), _M64, 32)
    left = _undo_norm(params["conv_norm_out"], static)
    shortcut = params["up_blocks.3"]["resnets.0"]["conv_shortcut"]
    for index in np.ndindex(gated.shape):
        shortcut["kernel"][0, 0, gated[index], places[index]] = 1
        shortcut["bias"][places[index]] = -left[places[index]]
        sign = 1 if index[2] == 0 else -1
        params["conv_out"]["kernel"][1, 1, places[index], index[3]] = sign
    params["conv_out"]["bias"][:] = codec.mean.reshape(-1, 3).mean(0)
    return params


def _four(
    conv: dict, maps: np.ndarray, width: int, ramps: tuple, side: int, penalty: float,
    groups: int = GROUPS,
) -> tuple[np.ndarray, tuple[int, ...]]:  # fmt: skip
    """Copies for the four places of a cell: `[row, column, sign, number]` channels, and three
    that are free for the finer ramps.

    Args:
      conv: the upsampler's convolution.
      maps: `[2, 2, inputs, numbers]`, of the first `inputs` channels.
      width: of the layer.
      ramps: input channels of the coarse one and ramps.
      side: of the coarse grid.
      penalty: M.
      groups: among which the copies are dealt out.
    """  # noqa: D205
    inputs, numbers = maps.shape[2:]
    gated = _spread(8 * numbers, width, groups).reshape(2, 2, numbers, 2).transpose(0, 1, 3, 2)
    for a in (0, 1):
        for b in (0, 1):
            for s, sign in enumerate((1, -1)):
                conv["kernel"][1, 1, :inputs, gated[a, b, s]] = sign * maps[a, b].T
    _gates(conv, ramps, side, penalty, _four_gates(gated))
    free = np.setdiff1d(np.arange(width), gated)[:3]
    return gated, tuple(int(channel) for channel in free)


def _four_gates(gated: np.ndarray) -> list:
    return [(gated[index], index[0], index[1]) for index in np.ndindex(gated.shape)]


def _zeros(tree: dict) -> dict:
    return {
        key: _zeros(value) if isinstance(value, dict) else np.zeros(value.shape, np.float64)
        for key, value in tree.items()
    }
