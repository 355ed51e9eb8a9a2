"""What a case of the kernels' benchmark is: one kernel at one shape, on any device and of any size.

A case makes its arguments and binds them into functions of none, so that the benchmark times them on a GPU at the sizes
that are served, and a test runs the same ones at tiny sizes in Triton's interpreter. Knows nothing of time.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Function = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model and its batches. As they stand: Llama-8B's, in bfloat16."""

    dtype: torch.dtype = torch.bfloat16
    vocabulary: int = 128256
    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head: int = 128
    block_size: int = 16
    batches: tuple[int, ...] = (1, 32, 256)
    """Rows of a decode step."""
    layer_rows: tuple[int, ...] = (1, 32, 256, 4096)
    product_rows: tuple[int, ...] = (1, 16, 64)
    context: int = 2048
    """Keys of a decode row, and of the prefix that samples share."""
    own: int = 200
    """Keys that each of the samples has for itself."""
    samples: int = 32
    prompt: int = 8192
    cached: int = 6144
    """So much of the prompt stands in the cache already, in the second case of prefill."""
    edits: int = 500
    """Of each row of logits that has any."""
    alternatives: int = 20
    drafts: int = 4
    beams: tuple[int, int] = (8, 4)
    """Requests, and the width of each."""


TINY = Sizes(
    vocabulary=5003,
    hidden=256,
    inner=192,
    heads=4,
    kv_heads=2,
    head=16,
    batches=(2,),
    layer_rows=(3,),
    product_rows=(3,),
    context=300,
    own=20,
    samples=2,
    prompt=130,
    cached=64,
    edits=7,
    alternatives=4,
    drafts=2,
    beams=(1, 1),
)
"""For Triton's interpreter, which takes its time for operations and hardly for elements."""


@dataclass(frozen=True, slots=True)
class Target:
    """What issue and study ask for, where they ask.

    floor: at most so many times the floor. bandwidth: at least this share of the copy bandwidth. usual: at least so
    many times as fast as the usual torch.
    """

    kind: Literal["floor", "bandwidth", "usual"]
    limit: float


@dataclass(slots=True)
class Work:
    """A case's functions, bound to arguments on a device. Each may be called any number of times."""

    kernel: Function
    reference: Function
    """In the dtype that is served; what torch.compile is given, too."""
    check: Callable[[], list[tuple[Tensor, Tensor]]]
    """Pairs of what the kernel gives and what is true: integers (equal, but for `num_ties`) or floats (near)."""
    num_bytes: int
    num_flops: int = 0
    """0: of no interest."""
    usual: Function | None = None
    """What people write in torch, where that is not the reference."""
    libraries: Mapping[str, Callable[[], Function]] = field(default_factory=dict)
    """By package: made where the package is installed; making may raise anything."""
    tolerance: float | None = None
    """Relative; None: two units in the last place of the result's dtype."""
    num_ties: int = 0
    """So many integers of a result may differ, where rounding of noise may decide."""


@dataclass(frozen=True, slots=True)
class Case:
    kernel: str
    """Its file in kernels/."""
    what: str
    make: Callable[[torch.device], Work]
    is_quick: bool = True
    is_compiled: bool = False
    """torch.compile is tried: of each kind of case once, because it takes seconds."""
    targets: tuple[Target, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.kernel}: {self.what}"


class Wrong(Exception):
    """A kernel's result is not what is true."""


def compare(work: Work) -> float:
    """The largest difference of the pairs, relative to what is true (0 for integers). Raises Wrong."""
    largest = 0.0
    for number, (actual, expected) in enumerate(work.check()):
        if actual.shape != expected.shape:
            raise Wrong(f"result {number} is {tuple(actual.shape)}, not {tuple(expected.shape)}")
        if not actual.dtype.is_floating_point:
            num_different = int((actual != expected).sum())
            if num_different > work.num_ties:
                raise Wrong(f"{num_different} of {actual.numel()} integers of result {number} differ")
            continue
        tolerance = 2 * torch.finfo(actual.dtype).eps if work.tolerance is None else work.tolerance
        largest = max(largest, _difference(actual, expected, tolerance, number))
    return largest


def _difference(actual: Tensor, expected: Tensor, tolerance: float, number: int) -> float:
    """Of elements: relative to their own size, and of small ones to half of the usual size of an element, since sums
    of large terms may be small."""
    wide = torch.promote_types(expected.dtype, torch.float32)
    truth = expected.to(wide)
    is_infinite = truth.isinf()
    if not torch.equal(actual.to(wide)[is_infinite], truth[is_infinite]):
        raise Wrong(f"infinities of result {number} differ")
    truth = truth.masked_fill(is_infinite, 0.0)
    usual = truth.square().mean().sqrt() if truth.numel() else truth.sum()
    distance = (actual.to(wide).masked_fill(is_infinite, 0.0) - truth).abs_()
    distance /= truth.abs().clamp_min(usual / 2).clamp_min(1e-30)
    largest = float(distance.max()) if distance.numel() else 0.0
    if not largest <= tolerance:  # NaN, too
        raise Wrong(f"result {number} is off by {largest:.1e} relative, {tolerance:.1e} is allowed")
    return largest


def randn(*shape: int, seed: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """The same numbers each time, made on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    made = torch.empty(*shape, dtype=dtype, device=device)
    # Some rows at a time: float32 of everything might not fit beside it.
    rows = made.view(-1, shape[-1])
    for part in rows.split(max(1, 2**27 // shape[-1])):
        part.copy_(torch.randn(*part.shape, generator=generator, device=device) * scale)
    return made


def integers(*shape: int, seed: int, high: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """From 0 to high - 1."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(0, high, shape, generator=generator, device=device).to(dtype)


def column(
    values: Iterable[float] | int | float, count: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[count]: one number for all, or one for each."""
    if isinstance(values, (int, float)):
        return torch.full((count,), values, dtype=dtype, device=device)
    return torch.tensor(list(values), dtype=dtype, device=device)


def pairs(actual: Any, expected: Any) -> list[tuple[Tensor, Tensor]]:
    """Of one tensor each, or of tuples of them."""
    if isinstance(actual, Tensor):
        return [(actual, expected)]
    return list(zip(actual, expected, strict=True))


def rows_of(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
