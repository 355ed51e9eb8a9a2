"""Loads a model: from what the user calls it to a module on its device, a tokenizer, and facts about both.

The module is transformers' own, in eval mode, with the attention it came with: the engine puts its own in. How its
weights get there is `models.module`'s business.
Knows nothing of requests, caches or batches.
"""

import contextlib
import gc
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cadenza.models import gguf
from cadenza.models.architecture import causal_lm_class, context_length, read_config
from cadenza.models.checkpoint import Checkpoint, open_checkpoint
from cadenza.models.errors import ModelError
from cadenza.models.generation_config import FILE_NAME, eos_ids, read_generation_config, sampling_defaults
from cadenza.models.offload.budget import StepNeeds, limits
from cadenza.models.quantization.names import GROUP_SIZES, Quantization
from cadenza.models.source import resolve, served_name
from cadenza.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from cadenza.models.offload.placement import Placement

Needs = Callable[["torch.device"], StepNeeds]
DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """auto: float32 on a CPU; on a GPU the checkpoint's own, bfloat16 where that is float32. float16 on a CPU without
    instructions for it takes 3 to 13 times as long as float32 for 4 to 128 tokens."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    trust_remote_code: bool = False
    allow_pickle: bool = False
    revision: str | None = None
    chat_template: str | None = None
    """Path of a template, or the template itself."""
    generation_config: str = "auto"
    """auto: the model's own; none: no sampling defaults; otherwise the path of a file or its folder."""
    max_model_len: int | None = None
    quantization: Quantization = "none"
    """How linear layers and the token embedding are stored: none keeps the dtype. See `models.quantization`."""
    quantization_group_size: int | None = None
    """Weights that share a scale in int4: 32, 64 or 128. None: 32; no other method lets them be chosen."""
    max_memory: str | None = None
    """Of the device, or by device, such as 2GiB or cuda:0=20GiB,cpu=30GiB: weights beyond it wait elsewhere. Counts
    weights, the KV cache and what a step takes; not the process itself, nor a draft model. None: all must fit."""
    cpu_offload_gb: float = 0.0
    """On a GPU: so many units of 1024³ bytes of weights stay in CPU memory."""
    offload_folder: str | None = None
    """For weights that wait on disk and cannot be read from the checkpoint's own files. None: in the cache."""

    @property
    def group_size(self) -> int:
        return GROUP_SIZES[0] if self.quantization_group_size is None else self.quantization_group_size


@dataclass
class LoadedModel:
    source: str
    name: str
    path: Path
    module: Any
    """A transformers `PreTrainedModel`."""
    config: Any
    """The configuration of its text part."""
    tokenizer: Tokenizer
    device: "torch.device"
    dtype: "torch.dtype"
    """Of activations and of what is not quantized."""
    fingerprint: str
    eos_token_ids: tuple[int, ...]
    sampling_defaults: dict[str, float | int]
    max_model_len: int
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds by stage, in order."""
    quantization: Quantization = "none"
    placement: "Placement | None" = None
    """Which weights wait elsewhere; None: none do."""
    num_parameters: int = 0
    """That the model was made of, whatever they are stored as; 0: as many as the module has."""
    weight_bytes: int = field(init=False)
    """What parameters and buffers took, on the device, when they were loaded."""

    @property
    def kv_cache_bytes(self) -> int | None:
        """What `max_memory` leaves for an engine's KV cache; None: nothing is limited."""
        return None if self.placement is None else self.placement.kv_cache_bytes

    def __post_init__(self) -> None:
        self.num_parameters = self.num_parameters or sum(part.numel() for part in self.module.parameters())
        tensors = itertools.chain(self.module.parameters(), self.module.buffers())
        self.weight_bytes = sum(tensor.nbytes for tensor in tensors)
        if self.placement is not None:
            self.weight_bytes = self.placement.resident_bytes


def load_model(source: str, config: LoadConfig = LoadConfig(), needs: Needs | None = None) -> LoadedModel:
    """Everything the engine needs of a model. Raises `ModelError`.

    needs: what an engine on this device will take of `max_memory`, where that is given; None: one with its defaults.
    """
    check(config)
    with _no_garbage_collection():
        return _load(source, config, needs)


def check(config: LoadConfig) -> None:
    """Raises `ModelError` for what no model could be loaded with."""
    if config.dtype not in DTYPES:
        raise ModelError(f"dtype {config.dtype!r} is not one of {', '.join(DTYPES)}")
    group_size = config.quantization_group_size
    if config.quantization != "int4" and group_size is not None:
        raise ModelError(
            f"quantization_group_size {group_size} is for quantization int4 only, not for {config.quantization}"
        )


def _load(source: str, config: LoadConfig, needs: Needs | None) -> LoadedModel:
    timings: dict[str, float] = {}
    with _stage("resolve", timings):
        folder = resolve(
            source,
            revision=config.revision,
            allow_pickle=config.allow_pickle,
            trust_remote_code=config.trust_remote_code,
        )
        checkpoint = open_checkpoint(folder, allow_pickle=config.allow_pickle)
        stored_dtype = checkpoint.float_dtype
        checkpoint.prefetch()
    with _stage("import", timings):
        import torch

        from cadenza.models.module import ModuleSource, load_module, num_parameters
        from cadenza.models.prequantized.checkpoint import announce
        from cadenza.models.prequantized.detect import taken_format
        from cadenza.models.quantization.methods import method_named

        device = device_named(config.device)
        model_config = read_config(folder, trust_remote_code=config.trust_remote_code)
        stored_format = taken_format(model_config)
        model_class = causal_lm_class(model_config, trust_remote_code=config.trust_remote_code)
    text_config = model_config.get_text_config(decoder=True)
    dtype: torch.dtype = getattr(torch, dtype_named(config.dtype, device.type, stored_dtype))
    max_model_len = context_length(text_config, config.max_model_len)
    allowed = limits(
        config.max_memory,
        config.cpu_offload_gb,
        config.offload_folder,
        str(device),
        replace(StepNeeds() if needs is None else needs(device), context_length=max_model_len),
    )
    with _stage("tokenizer", timings):
        tokenizer = Tokenizer.from_folder(
            folder,
            chat_template=_template_text(config.chat_template),
            trust_remote_code=config.trust_remote_code,
        )
    gguf.announce(folder, config.quantization)
    if stored_format is not None:
        announce(served_name(source), stored_format, config.quantization, config.group_size, dtype)
    with _stage("weights", timings):
        module = load_module(
            ModuleSource(
                source,
                folder,
                checkpoint,
                model_class,
                model_config,
                dtype,
                device,
                config.trust_remote_code,
                allowed,
                stored_format,
            ),
            method_named(config.quantization, config.group_size, device),
        )
    own = read_generation_config(folder)
    return LoadedModel(
        source=source,
        name=served_name(source),
        path=folder,
        module=module,
        config=text_config,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        quantization=config.quantization,
        placement=getattr(module, "placement", None),
        num_parameters=num_parameters(model_class, model_config),
        fingerprint=_fingerprint(folder, checkpoint, dtype, config),
        eos_token_ids=eos_ids(own.get("eos_token_id"), text_config.eos_token_id, tokenizer.eos_token_id),
        sampling_defaults=_sampling_defaults(config.generation_config, own),
        max_model_len=max_model_len,
        timings=timings,
    )


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """What the imports of torch and transformers make stays: looking for garbage there costs 0.5 s."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _stage(name: str, timings: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[name] = time.perf_counter() - start


def device_named(name: str) -> "torch.device":
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ModelError(f"device {name!r} is not auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device {name} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def dtype_named(asked: str, device_type: str, stored: str | None) -> str:
    if asked != "auto":
        return asked
    if device_type == "cpu":
        return "float32"
    return "bfloat16" if stored in (None, "float32") else stored


def _template_text(template: str | None) -> str | None:
    """A template is told from a path by its braces or line breaks, which no path of ours has."""
    if template is None or "{" in template or "\n" in template:
        return template
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"the chat template {template} cannot be read: {error.strerror}") from error


def _sampling_defaults(choice: str, own: dict[str, Any]) -> dict[str, float | int]:
    if choice == "none":
        return {}
    if choice == "auto":
        return sampling_defaults(own, FILE_NAME)
    path = Path(choice).expanduser()
    if not path.exists():
        raise ModelError(f"there is no generation config {choice}")
    return sampling_defaults(read_generation_config(path), choice)


def _fingerprint(folder: Path, checkpoint: Checkpoint, dtype: "torch.dtype", config: LoadConfig) -> str:
    """Short, and different whenever weights, configuration, precision or engine version are."""
    from importlib.metadata import version

    configuration = (folder / "config.json").read_text(encoding="utf-8")
    group_size = config.group_size if config.quantization == "int4" else 0
    quantization = f"{config.quantization}:{group_size}"
    parts = (version("cadenza"), str(dtype), quantization, configuration, checkpoint.digest())
    return "fp_" + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
