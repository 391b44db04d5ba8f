"""Sizes of the tiles of the attention's Triton kernels, and what their calls have in common.

The first candidate of each list is within 99 KiB of shared memory, what the smallest card can have. With keys of 16
channels or folded ones it has no spills on whole tiles up to 64 channels, and at 128 in `attention_column_gradients` of
tf32 only, whose operands take registers to be rounded; on other tiles a few, for the masks. Larger key maps and 256
channels spill more: tests/triton_kernels/test_ahead_of_time.py has the numbers.

A warp needs 16 rows to have work of its own in a chain of products, so that most programs have 16 rows for each of
their warps. Fewer have most of those whose threads would not have enough registers for their share of the rows: without
tensor cores, where a thread has all of the depth of its operands in registers; at 256 channels; and tf32 at 128.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastsam.ops._attention import Source
from fastsam.ops._triton.configurations import MOST_PROBLEMS, Configuration, check_channels, distinct
from fastsam.ops._triton.launch import padded, precision

KEY_BYTES = 32 * 1024
"""So much of a key map is in shared memory at a time."""


class Sizes(NamedTuple):
    """The numbers of a call that its kernels are compiled for. C, D, CZ: channels of maps, queries and z.

    kind: "half", "tf32" or "ieee", how products are computed. WHOLE and tile sizes come on top.
    """

    kind: str
    itemsize: int
    C: int
    D: int
    CZ: int
    SOURCES: int
    HAS_KEYS: bool
    PRECISION: str

    @classmethod
    def of(cls, sources: Sequence[Source], value_channels: int) -> "Sizes":
        """The sizes of a call on these sources.

        Raises:
            DoesNotFitError: there are no tiles for so many channels.
        """
        x, score, _, _, key = sources[0]
        product = precision(x)
        kind = product if x.dtype.itemsize == 4 else "half"
        sizes = cls(
            kind, x.dtype.itemsize, x.shape[1], score.shape[0], value_channels, len(sources), key is not None, product
        )
        check_channels(sizes.operator, sizes.C, sizes.D)
        return sizes

    @property
    def operator(self) -> str:
        """The operator's name."""
        return "self_attention" if self.SOURCES == 1 else "double_attention"

    @property
    def numbers(self) -> tuple[int, ...]:
        """What decides, next to the kind of arithmetic and the positions, which tiles are the fastest."""
        return self.C, self.D, self.CZ, self.SOURCES, int(self.HAS_KEYS)

    @property
    def width(self) -> int:
        """64, 128 or 256: the class of channels that the candidates are made for."""
        return max(64, padded(max(self.C, self.D)))

    def constants(self) -> dict[str, Any]:
        """The constants of the kernels but for tile sizes. Not to be changed."""
        return _constants(self)


@functools.lru_cache(MOST_PROBLEMS)
def _constants(sizes: Sizes) -> dict[str, Any]:
    channels, depth = padded(sizes.C), padded(sizes.D)
    return {
        "C": sizes.C,
        "D": sizes.D,
        "CZ": sizes.CZ,
        "CHANNELS": channels,
        "DEPTH": depth,
        "KEY_CHUNK": min(channels, KEY_BYTES // (depth * sizes.itemsize)),
        "SOURCES": sizes.SOURCES,
        "HAS_KEYS": sizes.HAS_KEYS,
        "PRECISION": sizes.PRECISION,
    }


# Rows of a program, columns of a tile that streams past, channels of a weight matrix at a time, warps, stages. Each
# first one serves keys of 16 channels and keys that are the columns themselves.
_Tiles = tuple[int, int, int, int, int]

_FORWARD: dict[tuple[str, int], list[_Tiles]] = {
    ("half", 64): [(64, 64, 64, 4, 1), (128, 64, 64, 8, 1), (64, 32, 64, 4, 1), (32, 64, 64, 2, 1)],
    ("half", 128): [(128, 32, 32, 8, 1), (64, 16, 16, 4, 1), (64, 32, 64, 4, 1), (128, 64, 64, 8, 1)],
    ("half", 256): [(32, 16, 32, 4, 1), (64, 16, 32, 8, 1)],
    ("tf32", 64): [(64, 32, 32, 4, 1), (64, 64, 64, 4, 1), (128, 32, 32, 8, 1), (32, 32, 32, 2, 1)],
    ("tf32", 128): [(64, 16, 64, 8, 1), (32, 16, 32, 4, 1), (64, 32, 64, 8, 1)],
    ("tf32", 256): [(32, 16, 16, 8, 1)],
    ("ieee", 64): [(32, 16, 16, 4, 1), (16, 16, 16, 4, 1), (64, 32, 16, 8, 1)],
    ("ieee", 128): [(16, 16, 16, 8, 1), (32, 16, 16, 8, 1)],
    ("ieee", 256): [(16, 16, 16, 8, 1)],
}

_QUERY_GRADIENTS: dict[tuple[str, int], list[_Tiles]] = {
    ("half", 64): [(64, 64, 64, 4, 1), (128, 64, 64, 8, 1), (64, 32, 64, 4, 1), (32, 64, 64, 2, 1)],
    ("half", 128): [(64, 16, 32, 4, 1), (64, 32, 32, 4, 1), (64, 64, 32, 4, 1)],
    ("half", 256): [(32, 16, 32, 8, 1), (32, 16, 32, 4, 1)],
    ("tf32", 64): [(64, 32, 32, 4, 1), (64, 16, 32, 4, 1), (128, 32, 32, 8, 1), (32, 32, 32, 2, 1)],
    ("tf32", 128): [(32, 16, 64, 4, 1), (64, 16, 32, 4, 1)],
    ("tf32", 256): [(16, 16, 16, 8, 1)],
    ("ieee", 64): [(32, 16, 16, 4, 1), (16, 16, 16, 4, 1)],
    ("ieee", 128): [(16, 16, 16, 8, 1), (16, 16, 16, 4, 1)],
    ("ieee", 256): [(16, 16, 16, 8, 1)],
}

_COLUMN_GRADIENTS: dict[tuple[str, int], list[_Tiles]] = {
    ("half", 64): [(64, 32, 64, 4, 3), (64, 64, 64, 4, 3), (128, 64, 64, 8, 3), (64, 64, 64, 4, 2)],
    ("half", 128): [(64, 16, 64, 4, 3), (64, 32, 64, 4, 2), (64, 64, 64, 4, 2)],
    ("half", 256): [(64, 16, 32, 4, 2)],
    ("tf32", 64): [(64, 16, 32, 4, 3), (64, 16, 64, 4, 3), (64, 32, 64, 4, 2), (128, 32, 64, 8, 3)],
    ("tf32", 128): [(64, 16, 64, 8, 2), (64, 16, 32, 4, 2), (64, 32, 64, 8, 2)],
    ("tf32", 256): [(16, 16, 16, 4, 1)],
    ("ieee", 64): [(32, 16, 16, 4, 1), (16, 16, 16, 4, 1), (32, 16, 16, 8, 1)],
    ("ieee", 128): [(16, 16, 16, 8, 1), (16, 16, 16, 4, 1)],
    ("ieee", 256): [(16, 16, 16, 8, 1)],
}


@functools.lru_cache(MOST_PROBLEMS)
def forward(sizes: Sizes) -> tuple[Configuration, ...]:
    """Candidates of `attention_forward`."""
    candidates = _FORWARD[sizes.kind, sizes.width]
    return distinct(_configuration("BLOCK_QUERIES", "BLOCK_COLUMNS", tiles) for tiles in candidates)


@functools.lru_cache(MOST_PROBLEMS)
def query_gradients(sizes: Sizes) -> tuple[Configuration, ...]:
    """Candidates of `attention_query_gradients`."""
    candidates = _QUERY_GRADIENTS[sizes.kind, sizes.width]
    return distinct(_configuration("BLOCK_QUERIES", "BLOCK_COLUMNS", tiles) for tiles in candidates)


@functools.lru_cache(MOST_PROBLEMS)
def column_gradients(sizes: Sizes) -> tuple[Configuration, ...]:
    """Candidates of `attention_column_gradients`: its rows are columns, and queries stream past."""
    candidates, of_parts = _COLUMN_GRADIENTS[sizes.kind, sizes.width], _part_tiles(sizes)
    return distinct({**_configuration("BLOCK_COLUMNS", "BLOCK_QUERIES", tiles), **of_parts} for tiles in candidates)


def _configuration(rows: str, columns: str, tiles: _Tiles) -> Configuration:
    names = (rows, columns, "CHUNK", "num_warps", "num_stages")
    return dict(zip(names, tiles, strict=True))


def _part_tiles(sizes: Sizes) -> Configuration:
    """Tiles of the weights' gradients, and the positions that they are summed over at a time."""
    most = 32 if sizes.kind == "ieee" else 64
    return {
        "SCORE_TILE": min(most, padded(sizes.D)),
        "VALUE_TILE": min(most, padded(sizes.CZ)),
        "CHANNEL_TILE": min(most, padded(sizes.C)),
        "BLOCK_POSITIONS": 32,
    }


def whole(positions: int, choice: Configuration) -> bool:
    """Whether no tile reaches beyond the positions."""
    return all(positions % size == 0 for name, size in choice.items() if name.startswith("BLOCK_"))
