"""A model without its weights: transformers' module with empty parameters, and where their tensors lie.

transformers resolves the checkpoint (renamed, fused or split tensors, pickles, another precision) as if all of it
were to be offloaded to disk; what it cannot read straight from the checkpoint's own files it writes to a folder.
Takes as much memory as the largest tensor. Knows nothing of quantization, devices or budgets.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cadenza.models.errors import ModelError, one_line
from cadenza.models.progress import progress_bars_on_terminals_only
from cadenza.models.unread import unread_where_left
from cadenza.models.weights import FileWeights, Place, tensors_of

CPU, DISK = "cpu", "disk"


def empty_module(model_class: Any, config: Any) -> Any:
    """The module with parameters and buffers on meta: shapes and types, no memory."""
    with torch.device("meta"):
        module = model_class(config)
    return module.eval().requires_grad_(False)


def hollow_module(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    """The module as it is made, parameters on meta; buffers that no checkpoint holds are real and have their values."""
    from accelerate import init_empty_weights

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights(include_buffers=False):
            module = model_class(config)
    finally:
        torch.set_default_dtype(default)
    keep_in_float32(module, dtype)
    return module.eval().requires_grad_(False)


def keep_in_float32(module: Any, dtype: torch.dtype) -> None:
    """The parts that their authors want so, in place, as `from_pretrained` does: routers' biases, say."""
    names = tuple(module._get_dtype_plan(dtype)) if hasattr(module, "_get_dtype_plan") else ()
    for path, part in module.named_modules() if names else ():
        for own_name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is None or not any(name in f"{path}.{own_name}".split(".") for name in names):
                continue
            if own_name in part._parameters:
                part._parameters[own_name] = nn.Parameter(tensor.float(), requires_grad=False)
            else:
                part._buffers[own_name] = tensor.float()


def open_skeleton(
    model_class: Any, folder: Path, config: Any, dtype: torch.dtype, scratch: Path, *, is_pickle: bool = False
) -> tuple[Any, FileWeights]:
    """The module with real buffers and meta parameters, and all tensors of its state, tied ones under each name.

    The smallest layer of the model, which accelerate wants in memory, is real, too. scratch: a folder for what the
    checkpoint does not hold as the model wants it; the weights are read from there later. Raises `ModelError` where
    the checkpoint does not fit the model.
    """
    from accelerate.hooks import remove_hook_from_submodules

    plan = _everything_on_disk(empty_module(model_class, config))
    try:
        with progress_bars_on_terminals_only(), _without_advice(), unread_where_left():
            module, report = model_class.from_pretrained(
                str(folder),
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=not is_pickle,
                output_loading_info=True,
                device_map=plan,
                offload_folder=str(scratch),
            )
    except (OSError, RuntimeError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"the weights in {folder} cannot be loaded: {one_line(error)}") from error
    require_all_tensors(report, folder)
    index = _offload_index(module)
    remove_hook_from_submodules(module)
    headers: dict[Path, Any] = {}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    places = {
        name: _place(name, facts, scratch, headers) for name, facts in index.items() if name in parameters
    }
    for name, tied_to in module.all_tied_weights_keys.items():
        if name not in places and tied_to in places:
            places[name] = places[tied_to]
    if lost := [name for name, tensor in parameters.items() if tensor.is_meta and name not in places]:
        raise ModelError(f"the weights in {folder} cannot be read one by one: {lost[0]} was not found")
    _require_shapes(parameters, places, folder)
    in_memory = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if not tensor.is_meta and name not in places
    }
    return module.eval().requires_grad_(False), FileWeights(places, in_memory)


def require_all_tensors(report: Any, folder: Path) -> None:
    """report: what `from_pretrained(output_loading_info=True)` says of the loading."""
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"the weights in {folder} lack {len(missing)} of the model's tensors, such as {missing[0]}"
        )


def _require_shapes(parameters: dict[str, nn.Parameter], places: dict[str, Place], folder: Path) -> None:
    """What stays on disk has not been compared with the model by transformers."""
    for name, place in places.items():
        if place.shape != tuple(parameters[name].shape):
            stored, wanted = list(place.shape), list(parameters[name].shape)
            raise ModelError(
                f"the weights in {folder} do not fit the model: {name} is {stored}, not {wanted}"
            )


def _everything_on_disk(module: nn.Module) -> dict[str, str]:
    """A device map: all layers on disk but the smallest one, since accelerate refuses a map without a device."""
    sizes = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in module.named_modules()
        if name and not list(part.children())
    }
    smallest = min((name for name, size in sizes.items() if size), key=lambda name: sizes[name])
    plan: dict[str, str] = {}

    def divide(prefix: str, parent: nn.Module) -> None:
        for name, _ in parent.named_parameters(recurse=False):
            plan[prefix + name] = DISK
        for name, _ in parent.named_buffers(recurse=False):
            plan[prefix + name] = CPU
        for name, child in parent.named_children():
            path = prefix + name
            if path == smallest or not any(True for _ in child.parameters()):
                plan[path] = CPU
            elif smallest.startswith(f"{path}."):
                divide(f"{path}.", child)
            else:
                plan[path] = DISK

    divide("", module)
    return plan


def _offload_index(module: nn.Module) -> dict[str, dict[str, Any]]:
    """accelerate's notes on where each offloaded tensor is."""
    for part in module.modules():
        weights_map = getattr(getattr(part, "_hf_hook", None), "weights_map", None)
        if weights_map is not None:
            return dict(weights_map.dataset.index)
    raise ModelError(f"{type(module).__name__} has no layer that could be read from disk")


def _place(name: str, facts: dict[str, Any], scratch: Path, headers: dict[Path, Any]) -> Place:
    wanted: torch.dtype = getattr(torch, facts["dtype"])
    if facts.get("safetensors_file") is None:  # written by accelerate: the bytes, nothing else
        return Place(scratch / f"{name}.dat", 0, wanted, tuple(facts["shape"]), wanted)
    file = Path(facts["safetensors_file"])
    if file not in headers:
        headers[file] = tensors_of(file)
    offset, stored, shape = headers[file][facts.get("weight_name", name)]
    return Place(file, offset, stored, shape, wanted)


@contextmanager
def _without_advice() -> Iterator[None]:
    """accelerate warns that parts are offloaded, which is what was asked of it."""
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
