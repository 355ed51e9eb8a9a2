"""What compiled kernels need of a GPU, without one: Triton brings the compilers, for any architecture.

Launches are recorded from the functions that make them, called with tensors that have no data, so that what is compiled
here is what would be launched. What a kernel needs is kept in tables, tests/kernels/resources/*.json: one that no
longer fits its table has changed its speed, and whoever changes it measures again. CADENZA_WRITE_RESOURCES=1 writes
the tables instead of comparing with them.
"""

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from cadenza.kernels import ops

MEASURED_WITH = "3.9.0"
"""The version of Triton that the tables are of. Others may take what registers there are without spilling, and what any
GPU has of shared memory: 3.6 sorts with twice as many of the first, through the second."""

_TABLES = Path(__file__).parent / "kernels" / "resources"
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Launch:
    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that has no data."""
    return torch.empty(shape, dtype=dtype, device="meta")


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Kernels that are launched inside are not run, but noted."""
    launches: list[Launch] = []

    def launcher(self: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            names = [parameter.name for parameter in self.params]
            own = dict(zip(names, args, strict=False)) | {key: kwargs[key] for key in names if key in kwargs}
            assert len(own) == len(names), f"{self.__name__}: {set(names) - set(own)} not given"
            options = {key: value for key, value in kwargs.items() if key not in names}
            launches.append(Launch(self, own, options))

        return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "__getitem__", launcher)
        patch.setattr(ops, "runs_triton", lambda device: True)
        yield launches


def compiled(launch: Launch, architecture: int) -> Any:
    """As Triton specializes a launch: pointers and integers that are multiples of 16 are known to be, ones are
    constants."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for number, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        is_fixed = value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize)
        if parameter.is_constexpr or is_fixed:
            signature[name], constants[name] = "constexpr", value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        signature[name] = _TYPES[value.dtype] if is_tensor else _scalar(value)
        is_aligned = (
            value.storage_offset() * value.element_size() % 16 == 0 if is_tensor else _is_multiple(value)
        )
        if is_aligned and not parameter.do_not_specialize:
            attributes[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_multiple(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value % 16 == 0


def needs(launch: Launch, architecture: int, folder: Path) -> dict[str, int]:
    """registers per thread; bytes of shared memory per program; bytes on the stack and instructions that use it, which
    are spills; loads of 16 bytes; instructions of tensor cores."""
    result = compiled(launch, architecture)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(result.asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", _dump(cubin, "--dump-resource-usage"))
    assert usage is not None
    registers, stack, local = map(int, usage.groups())
    code = _dump(cubin, "--dump-sass")
    return {
        "registers": registers,
        "shared": int(result.metadata.shared),
        "spills": stack + local + len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "wide_loads": len(re.findall(r"\b(?:LDG|LDGSTS)\.E\.\S*128", code)),
        "tensor_cores": len(re.findall(r"\b(?:HMMA|HGMMA|IMMA|IGMMA)\.", code)),
    }


def _dump(cubin: Path, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, what, cubin], capture_output=True, text=True, check=True).stdout


def check_needs(table: str, case: str, call: Callable[[], object], folder: Path) -> None:
    """Compile all kernels that `call` launches for sm_80 and sm_90, and compare them with resources/{table}.json.

    Nothing may be spilled, whatever the table says. Asserts.
    """
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    with recording() as launches:
        call()
    assert launches, f"{case} launches no kernel"
    path = _TABLES / f"{table}.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    found: dict[str, dict[str, int]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))  # or it would be found compiled by another version
        for number, launch in enumerate(launches):
            for architecture in (80, 90):
                own = needs(launch, architecture, folder)
                found[f"{case}, {number}: {launch.name}, sm_{architecture}"] = own
                assert own.pop("spills") == 0, f"{launch.name} spills registers ({case}, sm_{architecture})"
    if os.environ.get("CADENZA_WRITE_RESOURCES"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(rows | found, indent=1) + "\n")
        return
    for row, own in found.items():
        assert row in rows, f"resources/{table}.json does not have {row!r}: {own}"
        expected = rows[row]
        if triton.__version__ == MEASURED_WITH:
            assert own == expected, row
        else:
            assert own["shared"] <= max(expected["shared"], 99 * 1024), row
            assert (own["wide_loads"] > 0) == (expected["wide_loads"] > 0), row
            assert (own["tensor_cores"] > 0) == (expected["tensor_cores"] > 0), row
