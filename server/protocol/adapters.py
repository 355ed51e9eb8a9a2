"""The bodies that are about adapters: a request's weighted set, and loading, unloading and rolling back.

Checks shapes and ranges. Which adapters there are, and where they may come from, is not known here.
"""

from math import isfinite
from typing import Annotated, Any

from pydantic import Field, PlainValidator

from cadenza.decoding.adapters.module import name_fault
from cadenza.decoding.request import RequestError
from cadenza.server.protocol.wire import Wire

MAX_SCALE = 100.0
"""Beyond it sums leave the range of half precision, and no adapter means anything."""


def _id(value: Any) -> str | int:
    if isinstance(value, str) or type(value) is int:
        return value
    raise ValueError("must be an adapter's name, or its id as /v1/lora_adapters lists it.")


class LoraTerm(Wire):
    """llama.cpp's. The scale has no default: theirs is 0, which nobody who leaves it out expects."""

    id: Annotated[str | int, PlainValidator(_id)]
    scale: float


class AdapterFields(Wire):
    lora: list[LoraTerm] = Field(default_factory=list)

    def check(self) -> None:
        super().check()
        for index, term in enumerate(self.lora):
            if not (isfinite(term.scale) and abs(term.scale) <= MAX_SCALE):
                param = f"lora[{index}].scale"
                raise RequestError(
                    f"{param} must be between -{MAX_SCALE:g} and {MAX_SCALE:g}, got {term.scale}.", param
                )


Name = Annotated[str, Field(min_length=1)]
Generation = Annotated[int, Field(ge=0)]


class LoadAdapter(Wire):
    """vLLM's, with the last two of our own."""

    lora_name: Name
    lora_path: Name
    load_inplace: bool = False
    expected_generation: Generation | None = None
    pinned: bool | None = None
    """Absent: as the name was before."""

    def check(self) -> None:
        fault = name_fault(self.lora_name)
        if fault is not None:
            raise RequestError(f"lora_name: {fault}.", "lora_name")


class UnloadAdapter(Wire):
    lora_name: Name
    lora_int_id: int | None = None
    expected_generation: Generation | None = None


class RollBackAdapter(Wire):
    lora_name: Name
    expected_generation: Generation | None = None
