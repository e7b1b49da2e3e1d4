"""What a block costs on one device: compiled for it or, where nothing compiles, by roofline.

With r the roofline's time, the larger of operations over the peak and bytes (weights, inputs,
results) over the memory's bandwidth, a block need not be compiled where another of its kind was:

    t = t_like r / r_like.                                                       (1)
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tlcm_jax.models.lora import LoRAConfig
from tlcm_jax.planning import kernels, programs
from tlcm_jax.planning.aot import single_device
from tlcm_jax.planning.blocks import Block
from tlcm_jax.planning.cycles import read_program
from tlcm_jax.planning.programs import Program
from tlcm_jax.planning.topologies import Device
from tlcm_jax.training.compilation import TPU_FORWARD

# What a block's cost depends on.
_SOURCES = (
    *(f"models/{name}" for name in ("attention", "embeddings", "layers", "lora", "resnet")),
    *("models/splash", "models/transformer"),
    *(f"planning/{name}" for name in ("cost", "cycles", "kernels", "programs")),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """One call of a program on one device.

    Attributes:
      seconds: modelled.
      flops: counted from its trace, without what rematerialisation does again.
      temporaries: bytes beside arguments and results.
      kept: of a gradient: bytes that the forward pass keeps for the backward pass, at most.
    """

    seconds: float
    flops: int
    temporaries: int
    kept: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiler:
    """Costs of blocks, each compiled once and kept in a folder for the next time.

    Attributes:
      device: what for.
      dtype: of weights that are not trained.
      options: the compiler's, for programs without gradients.
      store: folder of costs; None keeps them in memory alone.
      progress: told what is compiled.
    """

    device: Device
    dtype: Any = jnp.bfloat16
    options: Mapping[str, Any] = dataclasses.field(default_factory=lambda: TPU_FORWARD)
    store: Path | None = None
    progress: Callable[[str], None] = lambda text: None
    _known: dict[str, Cost] = dataclasses.field(default_factory=dict)

    def forward(self, block: Block, batch: int, like: Block | None = None) -> Cost:
        """One call without gradients.

        Args:
          block: the block.
          batch: samples.
          like: what is compiled in its place (1); None compiles the block itself.
        """
        return self._cost(
            programs.forward(block, batch, self.dtype),
            None if like is None else programs.forward(like, batch, self.dtype),
        )

    def gradient(
        self, block: Block, batch: int, adapter: LoRAConfig | None, like: Block | None = None
    ) -> Cost:
        """A call, and the gradients of its inputs and of an adapter beside its weights.

        Args:
          block: the block.
          batch: samples.
          adapter: whose factors are trained; None trains the weights themselves.
          like: as of `forward`.
        """
        return self._cost(
            programs.gradient(block, batch, self.dtype, adapter),
            None if like is None else programs.gradient(like, batch, self.dtype, adapter),
        )

    def roofline(self, block: Block, batch: int = 1) -> float:
        """The least seconds of a call without gradients."""
        return self._bound(programs.forward(block, batch, self.dtype))

    def _bound(self, program: Program) -> float:
        return self.device.roofline(program.flops, program.moved)

    def _cost(self, program: Program, like: Program | None) -> Cost:
        key = self._key(program, like)
        if key in self._known:
            return self._known[key]
        stored = None if self.store is None else self.store / f"{key}.json"
        if stored is not None and stored.is_file():
            return Cost(**json.loads(stored.read_text(encoding="utf-8")))
        if self.device.compiled and like is not None:
            compiled = self._cost(like, None)
            cost = Cost(
                seconds=compiled.seconds * self._bound(program) / self._bound(like),  # (1)
                flops=program.flops,
                temporaries=int(compiled.temporaries * program.moved / like.moved),
            )
        else:
            self.progress(f"{program.block.kind}, batch {program.batch}: {program.what}")
            if self.device.compiled:
                cost = self._compile(program)
            else:
                cost = Cost(seconds=self._bound(program), flops=program.flops, temporaries=0)
        self._known[key] = cost = dataclasses.replace(cost, kept=program.kept)
        if stored is not None:
            stored.parent.mkdir(parents=True, exist_ok=True)
            stored.write_text(json.dumps(dataclasses.asdict(cost)), encoding="utf-8")
        return cost

    def _key(self, program: Program, like: Program | None) -> str:
        """All that a cost depends on, this package's own lines through their text."""
        said: list[Any] = [self.device, str(self.dtype), self._options(program), _versions()]
        for each in filter(None, (program, like)):
            shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), each.shapes)
            said += [each.block.module, each.block.remat, each.what, shapes]
        return hashlib.sha256(repr(said).encode()).hexdigest()[:32]

    def _options(self, program: Program) -> dict[str, Any]:
        return dict(self.options) if program.what == "forward" else {}

    def _compile(self, program: Program) -> Cost:
        place = single_device(self.device.smallest)
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), program.shapes
        )
        lowered = jax.jit(program.run).lower(*placed)
        compiled = lowered.compile(compiler_options=self._options(program))
        reading, used = read_program(compiled.as_text() or ""), compiled.memory_analysis()
        seconds = reading.cycles / self.device.clock
        seconds += sum(kernels.seconds(kernel, self.device) for kernel in reading.kernels)
        return Cost(
            seconds=seconds,
            flops=program.flops,
            temporaries=0 if used is None else used.temp_size_in_bytes,
        )


@functools.cache
def _versions() -> tuple[str, ...]:
    """Of the compilers, of the blocks' own lines, and of what reads the programs."""
    root = Path(__file__).parents[1]
    text = b"".join((root / f"{name}.py").read_bytes() for name in _SOURCES)
    try:
        libtpu = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        libtpu = ""
    return jax.__version__, libtpu, hashlib.sha256(text).hexdigest()
