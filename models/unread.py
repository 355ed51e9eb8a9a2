"""Keeps transformers from reading tensors that stay where they lie.

Given a device map that leaves weights on disk, transformers 5 still reads and converts each of them before it finds
that the checkpoint's own file can be read later: all bytes twice, and all pages mapped at once. Inside
`unread_where_left` such a tensor is passed on empty, and files are read instead of mapped: its mapping is a writable
one, which counts, in full, against a limit of the process's memory. Should transformers' insides move, everything is
read as before.
Knows nothing of what is loaded or why.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_LOCK = threading.RLock()  # what is replaced is global


@contextmanager
def unread_where_left() -> Iterator[None]:
    """Inside the block `from_pretrained` reads only what it converts, or puts into memory."""
    from transformers import core_model_loading, modeling_utils

    load = getattr(modeling_utils, "convert_and_load_state_dict_in_model", None)
    renaming = getattr(core_model_loading, "WeightRenaming", None)
    if load is None or renaming is None:
        yield
        return
    convert = renaming.convert

    def load_rest(
        model: Any, state_dict: Any, load_config: Any, disk_offload_index: dict[str, Any] | None = None
    ) -> Any:
        left = set(disk_offload_index or ()) - {name for name, _ in model.named_buffers()}

        def convert_rest(self: Any, layer_name: str, *args: Any, **kwargs: Any) -> Any:
            if type(self) is renaming and kwargs.get("model") is model and layer_name in left:
                self.collected_tensors.clear()
                return {layer_name: torch.empty(0, device="meta")}
            return convert(self, layer_name, *args, **kwargs)

        renaming.convert = convert_rest
        try:
            return load(model, state_dict, load_config, disk_offload_index=disk_offload_index)
        finally:
            renaming.convert = convert

    with _LOCK, _files_unmapped():
        modeling_utils.convert_and_load_state_dict_in_model = load_rest
        try:
            yield
        finally:
            modeling_utils.convert_and_load_state_dict_in_model = load


@contextmanager
def _files_unmapped() -> Iterator[None]:
    """With a safetensors library that can read without mapping, which older ones cannot."""
    from safetensors import safe_open
    from transformers import modeling_utils
    from transformers.integrations import accelerate

    if "backend" not in (safe_open.__text_signature__ or ""):
        yield
        return

    def open_unmapped(*args: Any, **kwargs: Any) -> Any:
        return safe_open(*args, **kwargs | {"backend": "pread"})

    users = [module for module in (modeling_utils, accelerate) if hasattr(module, "safe_open")]
    for module in users:
        module.safe_open = open_unmapped
    try:
        yield
    finally:
        for module in users:
            module.safe_open = safe_open
