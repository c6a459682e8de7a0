"""What to measure, checked before anything is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from castling_det.analysis.benchmark.record import DTYPES, LEVELS, PASSES
from castling_det.analysis.benchmark.variants import COMPILED, VARIANTS

__all__ = ["DEFAULT_CONFIG_PREFIX", "DEFAULT_CONFIG_SUFFIX", "PATCH_SIZE", "BenchmarkOptions", "Case", "parse_size"]

DEFAULT_CONFIG_PREFIX = "configs/castling_vit/gfl_castling-vit-nano"
DEFAULT_CONFIG_SUFFIX = "_8xb16-100e_coco.py"
PATCH_SIZE = 16
"""Stride of the backbone's tokens in pixels."""

Size = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """What variants have in common when they are compared. Height and width as in `BenchmarkRow`."""

    level: str
    passes: str
    dtype: str
    batch: int
    height: int
    width: int

    @property
    def hw(self) -> Size:
        """Height and width."""
        return self.height, self.width

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


@dataclass(frozen=True)
class BenchmarkOptions:
    """The cases and how long to measure each.

    Args:
        levels: of `LEVELS`.
        sizes: height and width of the token map, for core and block.
        image_sizes: height and width of the image in pixels, for backbone and detector.
        variants: of `VARIANTS`.
        passes: of `PASSES`. dtypes: of `DTYPES`.
        batch: maps or images in one call.
        device: `"cpu"` or `"cuda"`.
        repeats: timed rounds of a case; in each, every variant is called twice in a row, and the second call is timed.
        warmup: rounds before them that are not timed.
        max_seconds: no round of a case begins later than this after its first.
        embed_dims: channels of core, block and backbone. num_heads: their heads. depth: blocks of the backbone.
        config_prefix: what stands before `_softmax`, `_castling` and `_linear` in the names of the detector's configs.
        config_suffix: what stands after them.

    Raises:
        ValueError: names the option, its value and what was expected.
    """

    levels: tuple[str, ...] = ("core", "block")
    sizes: tuple[Size, ...] = ((16, 16), (32, 32), (64, 64))
    image_sizes: tuple[Size, ...] = ((512, 512), (1024, 1024))
    variants: tuple[str, ...] = tuple(name for name in VARIANTS if name != COMPILED)
    passes: tuple[str, ...] = PASSES
    dtypes: tuple[str, ...] = ("float32",)
    batch: int = 1
    device: str = "cpu"
    repeats: int = 20
    warmup: int = 3
    max_seconds: float = 120.0
    embed_dims: int = 384
    num_heads: int = 6
    depth: int = 12
    config_prefix: str = DEFAULT_CONFIG_PREFIX
    config_suffix: str = DEFAULT_CONFIG_SUFFIX

    def __post_init__(self) -> None:
        _check_choices("levels", self.levels, LEVELS)
        _check_choices("variants", self.variants, tuple(VARIANTS))
        _check_choices("passes", self.passes, PASSES)
        _check_choices("dtypes", self.dtypes, DTYPES)
        for name in ("batch", "repeats", "warmup", "embed_dims", "num_heads", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{_flag(name)} {getattr(self, name)}: expected at least 1")
        if not 0 <= self.max_seconds < math.inf:
            raise ValueError(f"--max-seconds {self.max_seconds}: expected seconds >= 0; one round is always measured")
        if self.embed_dims % self.num_heads:
            raise ValueError(f"--num-heads {self.num_heads}: expected a divisor of --embed-dims {self.embed_dims}")
        self._check_sizes()
        if self.device not in ("cpu", "cuda") or (self.device == "cuda" and not torch.cuda.is_available()):
            usable = "'cpu' or 'cuda'" if torch.cuda.is_available() else "'cpu'; this torch sees no CUDA device"
            raise ValueError(f"--device {self.device}: expected {usable}")

    def _check_sizes(self) -> None:
        maps, images = bool({"core", "block"} & set(self.levels)), bool({"backbone", "detector"} & set(self.levels))
        for name, needed, sizes in (("sizes", maps, self.sizes), ("image_sizes", images, self.image_sizes)):
            if needed and not sizes:
                raise ValueError(f"--{_flag(name)}: expected at least one size")
            for height, width in sizes:
                if min(height, width) < 1:
                    raise ValueError(f"--{_flag(name)} {height}x{width}: expected sides of at least 1")
        for height, width in self.image_sizes if "backbone" in self.levels else ():
            if height % PATCH_SIZE or width % PATCH_SIZE:
                raise ValueError(f"--image-sizes {height}x{width}: expected multiples of {PATCH_SIZE} pixels")

    def cases(self) -> Iterator[Case]:
        """Every case, those of one table after one another."""
        for level in self.levels:
            for passes in self.passes:
                for dtype in self.dtypes:
                    for size in self.sizes if level in ("core", "block") else self.image_sizes:
                        yield Case(level, passes, dtype, self.batch, *size)

    def config_file(self, attention: str) -> str:
        """The detector's config for an attention mode."""
        return f"{self.config_prefix}_{attention}{self.config_suffix}"


def parse_size(option: str, text: str) -> Size:
    """`"16"` as 16 x 16, `"16x24"` as height x width.

    Raises:
        ValueError: neither of them; names `option`.
    """
    height, separator, width = text.partition("x")
    try:
        return int(height), int(width if separator else height)
    except ValueError:
        raise ValueError(f"{option} {text}: expected a side such as 16, or height x width such as 16x24") from None


def _check_choices(name: str, values: Sequence[str], choices: Sequence[str]) -> None:
    if not values:
        raise ValueError(f"--{_flag(name)}: expected at least one of {', '.join(choices)}")
    for value in values:
        if value not in choices:
            raise ValueError(f"--{_flag(name)} {value}: expected some of {', '.join(choices)}")
    if len(set(values)) < len(values):
        raise ValueError(f"--{_flag(name)} {' '.join(values)}: expected each at most once")


def _flag(name: str) -> str:
    return name.replace("_", "-")
