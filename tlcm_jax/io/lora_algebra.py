"""The change of a weight that a layer's part of a LoRA file stands for.

With W the layer's weight `[out, in]` or `[out, in, kh, kw]`, s = alpha / r, * elementwise and (x)
Kronecker's product:

    LoRA       s B A                                     (Hu et al., arXiv 2106.09685)       (1)
    LoCon      s B M A,  M a kernel between the factors  (LyCORIS, arXiv 2309.14859)         (2)
    LoHa       s (B1 A1) * (B2 A2)                       (Hyeon-Woo et al., arXiv 2108.06098) (3)
    LoKr       s C (x) D, either a product of two        (LyCORIS)                           (4)
    DoRA       m (W + D) / ||W + D|| - W                 (Liu et al., arXiv 2402.09353)      (5)

where D in (5) is any of the others, m a magnitude a row (of PEFT, and kohya's), or a column (of
older LyCORIS), and the norm over all other axes. (1) and (2) are of low rank and stay factors; the
others are added to the weights. Everything here is fp32 and in PyTorch's layout.
"""

from collections.abc import Mapping

import numpy as np

Parts = Mapping[str, np.ndarray]

_LORA = ("lora_A", "lora_B")
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_EPSILON = float(np.finfo(np.float32).eps)


def is_low_rank(parts: Parts) -> bool:
    """Whether a layer's parts are factors, (1) or (2)."""
    return parts.keys() <= {*_LORA, "lora_mid"}


def lacks(parts: Parts) -> tuple[str, ...]:
    """The parts that a layer's others need; a layer with nothing but a magnitude needs factors."""
    present = parts.keys()
    if any(part.startswith("hada_") for part in present):
        needed = list(_LOHA)
    elif any(part.startswith("lokr_") for part in present):
        needed = [
            part
            for w in ("lokr_w1", "lokr_w2")
            if w not in present
            for part in ((f"{w}_a", f"{w}_b") if {f"{w}_a", f"{w}_b"} & present else (w,))
        ]
    else:
        needed = list(_LORA)
    return tuple(part for part in needed if part not in present)


def rank(parts: Parts) -> int | None:
    """r; None where no part shows it, as in LoKr of two whole matrices."""
    for part, axis in (
        ("lora_A", 0), ("hada_w1_b", 0), ("lokr_w1_b", 0), ("lokr_w2_b", 0),
    ):  # fmt: skip
        if part in parts and parts[part].ndim > 0:
            return parts[part].shape[axis]
    return None


def factors(parts: Parts, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A and B of (1), or of (2) with M taken into A.

    A linear layer's factors may be a 1x1 convolution's, and the other way round.

    Args:
      parts: `lora_A`, `lora_B` and perhaps `lora_mid`.
      shape: the weight's.

    Returns:
      `[r, in, ...]` and `[out, r, 1, ...]`, as the weight has axes.

    Raises:
      ValueError: they are no factors of such a weight.
    """
    down, up = parts["lora_A"], parts["lora_B"]
    if "lora_mid" in parts:
        mid = parts["lora_mid"]
        down, outer = _matrix(down), _matrix(up).shape[1]
        if mid.ndim != 4 or mid.shape[:2] != (outer, down.shape[0]):
            raise _misfit(parts, shape)
        down = np.einsum("pqhw,qi->pihw", mid, down)
    columns, rows = _matrix(down), _matrix(up)
    inner = int(np.prod(shape[1:]))
    if not columns.shape[0] or columns.shape[1] != inner or rows.shape != (
        shape[0], columns.shape[0],
    ):  # fmt: skip
        raise _misfit(parts, shape)
    ones = (1,) * (len(shape) - 2)
    return columns.reshape(-1, *shape[1:]), rows.reshape(*rows.shape, *ones)


def delta(parts: Parts, scale: float, weight: np.ndarray) -> np.ndarray:
    """What is added to a weight: equations (1) to (5).

    Args:
      parts: of one layer, by name.
      scale: alpha / r.
      weight: the layer's, float32; its values are read for (5) alone.

    Returns:
      An array of the weight's shape.

    Raises:
      ValueError: the parts do not fit the weight.
    """
    if "hada_w1_a" in parts:
        change = _hadamard(parts, weight.shape)
    elif any(part.startswith("lokr_") for part in parts):
        change = _kronecker(parts, weight.shape)
    else:
        down, up = factors(parts, weight.shape)
        change = (_matrix(up) @ _matrix(down)).reshape(weight.shape)
    change = change * np.float32(scale)
    for part in ("magnitude", "dora_scale"):
        if part in parts:
            change = _decomposed(parts, part, weight + change) - weight
    return change


def _hadamard(parts: Parts, shape: tuple[int, ...]) -> np.ndarray:
    """Equation (3) without its scale."""
    products = []
    for i in (1, 2):
        b, a = parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"]
        products.append(_product(parts, b, a, f"hada_t{i}", shape))
    return products[0] * products[1]


def _kronecker(parts: Parts, shape: tuple[int, ...]) -> np.ndarray:
    """Equation (4) without its scale."""
    c = parts.get("lokr_w1")
    c = _matrix(parts["lokr_w1_a"]) @ _matrix(parts["lokr_w1_b"]) if c is None else _matrix(c)
    if shape[0] % max(c.shape[0], 1) or shape[1] % max(c.shape[1], 1):
        raise _misfit(parts, shape)
    inner = (shape[0] // max(c.shape[0], 1), shape[1] // max(c.shape[1], 1), *shape[2:])
    if "lokr_w2" in parts:
        d = _matrix(parts["lokr_w2"])
    else:
        d = _matrix(_product(parts, parts["lokr_w2_a"], parts["lokr_w2_b"], "lokr_t2", inner))
    if c.size * d.size != int(np.prod(shape)) or d.shape[0] != inner[0]:
        raise _misfit(parts, shape)
    return np.kron(c, d).reshape(shape)


def _product(
    parts: Parts, b: np.ndarray, a: np.ndarray, core: str, shape: tuple[int, ...]
) -> np.ndarray:
    """B A as an array of that shape; with a core T between them, both by their ranks first."""
    if core in parts:
        t = parts[core]
        fits = t.ndim == len(shape) and b.shape == (t.shape[0], shape[0])
        if not fits or a.shape != (t.shape[1], shape[1]) or t.shape[2:] != shape[2:]:
            raise _misfit(parts, shape)
        return np.einsum("ij...,ip,jr->pr...", t, b, a)
    b, a = _matrix(b), _matrix(a)
    if b.shape[1] != a.shape[0] or b.shape[0] != shape[0] or a.shape[1] != np.prod(shape[1:]):
        raise _misfit(parts, shape)
    return (b @ a).reshape(shape)


def _decomposed(parts: Parts, part: str, weight: np.ndarray) -> np.ndarray:
    """Equation (5)'s first term, given W + D."""
    magnitude = parts[part]
    # By column only where kohya's or LyCORIS's magnitude has a row of them.
    columns = part == "dora_scale" and magnitude.ndim > 1 and magnitude.shape[0] != weight.shape[0]
    kept = 1 if columns else 0
    if magnitude.size != weight.shape[kept]:
        raise _misfit(parts, weight.shape)
    axes = tuple(axis for axis in range(weight.ndim) if axis != kept)
    norm = np.sqrt(np.sum(np.square(weight), axis=axes, keepdims=True)) + _EPSILON
    return weight * (magnitude.reshape(norm.shape) / norm)


def _matrix(value: np.ndarray) -> np.ndarray:
    """All axes but the first as one."""
    return value.reshape(value.shape[0], -1) if value.ndim else value.reshape(1, 1)


def _misfit(parts: Parts, shape: tuple[int, ...]) -> ValueError:
    shapes = ", ".join(f"{part} {value.shape}" for part, value in sorted(parts.items()))
    return ValueError(f"has {shapes} for a weight {shape}")
