"""Triton's kernels in its interpreter, in this process, beside compiled ones: no TRITON_INTERPRET.

That variable would have to be set before anyone imports Triton, and nothing could be compiled in the same process. Here
every `kernel[grid](...)` inside the `with` runs interpreted, with all functions that it calls. Triton's own interpreter
also puts its functions in place of the language's anew for every device function that is called, which takes most of
its time, and leaves some of them there; here that is done once per module and launch, and undone. Of what remains, much
was spent on checks of overflow that it throws away, on looking up dtypes, and on reductions (within sorts, say) element
by element: these are left out, remembered, and done along the axis at once.

The interpreter runs programs one after another on CPU tensors. It cannot see races, alignment or how a tensor core
rounds, multiplies bfloat16 wrongly, and truncates where a GPU rounds to it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
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
    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        patch.setattr(interpreter, "_get_np_dtype", _np_dtype)
        patch.setattr(interpreter.ReduceOps, "generic_reduce", _reduce)
        patch.setattr(JITFunction, "__getitem__", _launcher)
        patch.setattr(JITFunction, "__call__", _called_by_a_kernel)
        patch.setattr(ops, "runs_triton", lambda device: True)
        yield


def _launcher(self: Any, grid: Any) -> Any:
    return KernelInterface.__getitem__(_Launch(self.fn), grid)


class _Launch(KernelInterface):
    def __init__(self, fn: FunctionType) -> None:
        self.function = _interpreted(fn)

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
    return _interpreted(self.fn).rewrite()(*args, **kwargs)


_interpreted = cache(interpreter.InterpretedFunction)
_find_np_dtype = interpreter._get_np_dtype
_np_dtypes: dict[str, Any] = {}


def _np_dtype(dtype: Any) -> Any:
    """Triton's, which makes a table of all dtypes each time that it is asked."""
    scalar = dtype.scalar
    if scalar.is_ptr():
        return _find_np_dtype(scalar)
    if scalar.name not in _np_dtypes:
        _np_dtypes[scalar.name] = _find_np_dtype(scalar)
    return _np_dtypes[scalar.name]


def _reduce(self: Any, parts: tuple[Any, ...]) -> list[Any]:
    """Along the axis in Triton's own order, with everything beside it at once."""
    axis = 0 if self.axis is None else self.axis
    arrays = [part.handle.data.reshape(-1) if self.axis is None else part.handle.data for part in parts]

    def at(place: int) -> list[Any]:
        own = zip(arrays, parts, strict=True)
        return [self.to_tensor(array.take(place, axis), part.dtype) for array, part in own]

    total: Any = at(0)
    for place in range(1, arrays[0].shape[axis]):
        total = self.combine_fn.fn(*total, *at(place))
        total = total if isinstance(total, tuple) else (total,)
    shape = arrays[0].shape[:axis] + arrays[0].shape[axis + 1 :]
    if self.keep_dims:
        is_flat = self.axis is None
        shape = (1,) * parts[0].handle.data.ndim if is_flat else (*shape[:axis], 1, *shape[axis:])
    found = [result.handle.data.reshape(shape) for result in total]
    return [
        self.to_tensor(data if shape else data.item(), part.dtype)
        for data, part in zip(found, parts, strict=True)
    ]


def poisoned(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """Memory as a kernel may find it: no numbers, and integers far beyond any index."""
    filler = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max
    return torch.full(shape, filler, dtype=dtype, device=device)
