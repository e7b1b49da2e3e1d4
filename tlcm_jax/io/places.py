"""Files that hold a network under other names: where each of its tensors lies in them."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np

from tlcm_jax.io.tensors import Tensors


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a file keeps a tensor.

    Attributes:
      key: the tensor's name there.
      part: which third of its leading axis, of a fused q, k and v; None for the whole.
      transposed: stored the other way round.
      convolution: a linear layer, stored as a 1x1 convolution.
    """

    key: str
    part: int | None = None
    transposed: bool = False
    convolution: bool = False


class PlacedTensors(Tensors):
    """Tensors of a file under the names that a network knows them by.

    Attributes:
      keys_used: the file's names of what was found.
    """

    def __init__(
        self,
        tensors: Tensors,
        places: Mapping[str, Place],
        *,
        former: Callable[[str], str] = lambda key: key,
        left_out: Callable[[str], bool] | None = None,
    ):
        """Finds the places that there are.

        Args:
          tensors: the file's.
          places: of every tensor wanted, by the network's names; those not in the file are absent.
          former: another name under which some files have a tensor.
          left_out: given, tensors of the file that nothing wants are kept under their own names,
            for whoever matches them to refuse, but for those it says yes to.
        """
        self._tensors = tensors
        self._places = places
        self._keys = {
            name: key
            for name, place in places.items()
            for key in (place.key, former(place.key))
            if key in tensors
        }
        self.keys_used: Collection[str] = set(self._keys.values())
        if left_out is not None:
            rest = [key for key in tensors if key not in self.keys_used and not left_out(key)]
            self._keys |= {key: key for key in rest}

    def __getitem__(self, name: str) -> np.ndarray:
        value = self._tensors[self._keys[name]]
        place = self._places.get(name, Place(name))
        if place.part is not None:
            third = len(value) // 3
            value = value[place.part * third : (place.part + 1) * third]
        return value.T if place.transposed else value

    def __iter__(self) -> Iterator[str]:
        order = {key: i for i, key in enumerate(self._tensors)}
        return iter(sorted(self._keys, key=lambda name: order[self._keys[name]]))

    def __len__(self) -> int:
        return len(self._keys)

    def label(self, name: str) -> str:
        """See `Tensors`."""
        return self._places[name].key if name in self._places else name

    def release(self) -> None:
        """See `Tensors`."""
        self._tensors.release()
