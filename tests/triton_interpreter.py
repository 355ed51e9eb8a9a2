"""Triton's kernels in its interpreter, in this process, beside compiled ones: no TRITON_INTERPRET.

That variable would have to be set before anyone imports Triton, and nothing could be compiled in the same process. Here
every `kernel[grid](...)` inside the `with` runs interpreted, with all functions that it calls. Triton's own interpreter
also puts its functions in place of the language's anew for every device function that is called, which takes most of
its time, and leaves some of them there; here that is done once per module and launch, and undone.

The interpreter runs programs one after another on CPU tensors. It cannot see races, alignment or how a tensor core
rounds, multiplies bfloat16 wrongly, and truncates where a GPU rounds to it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
import triton
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction, KernelInterface

from cadenza.kernels import ops


def skip_where_it_fails() -> None:
    """The interpreter of Triton 3.6 fails with NumPy 2.4 where a loop's end is not a constant."""
    if triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton 3.6 cannot interpret loops with NumPy 2.4")


@contextmanager
def interpreted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "__getitem__", _launcher)
        patch.setattr(JITFunction, "__call__", _called_by_a_kernel)
        patch.setattr(ops, "runs_triton", lambda device: True)
        yield


def _launcher(self: Any, grid: Any) -> Any:
    return KernelInterface.__getitem__(_Launch(self.fn), grid)


class _Launch(KernelInterface):
    def __init__(self, fn: FunctionType) -> None:
        self.function = interpreter.InterpretedFunction(fn)

    def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if not callable(grid) and 0 in grid:
            return
        fn = self.function.rewrite()
        try:
            _put_in_place(fn)
            with np.errstate(all="ignore"):  # NumPy warns of infinities, which are meant
                interpreter.GridExecutor(fn, self.function.arg_names, grid)(*args, **options)
        finally:
            for scope in reversed(_in_place.values()):  # the first knows what was there before any
                scope.restore()
            _in_place.clear()


_in_place: dict[int, Any] = {}


def _put_in_place(fn: FunctionType) -> None:
    if id(fn.__globals__) not in _in_place:
        _in_place[id(fn.__globals__)] = interpreter._patch_lang(fn)


def _called_by_a_kernel(self: Any, *args: Any, **kwargs: Any) -> Any:
    _put_in_place(self.fn)
    return interpreter.InterpretedFunction(self.fn).rewrite()(*args, **kwargs)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """Memory as a kernel may find it: no numbers, and integers far beyond any index."""
    filler = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max
    return torch.full(shape, filler, dtype=dtype, device=device)
