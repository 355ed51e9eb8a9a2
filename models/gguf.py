"""Turns a GGUF file, once, into a folder that loads like any other: config, float32 safetensors, tokenizer.

Dequantizing on every start would take tens of seconds; the converted folder loads in a fraction of one. The
reading and dequantizing is transformers' own; this module checks that nothing is missing afterwards. Knows
nothing of aliases or downloads.
"""

import contextlib
import io
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cadenza.models.cache import (
    build_folder,
    cache_root,
    exclusive,
    is_complete,
    read_manifest,
    remembered_digest,
    say,
)
from cadenza.models.errors import ModelError, one_line
from cadenza.models.gguf_header import GGUFHeader, read_header
from cadenza.models.gguf_tokenizer import end_ids, write_tokenizer

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

CONVERTER_VERSION = 1
"""Part of the folder's name: raise it when the outcome of a conversion changes."""
_FLOATS = ("F64", "F32", "F16", "BF16")


def converted_folder(gguf_sha256: str) -> Path:
    """Where the conversion of the file with this digest is, or would be."""
    return cache_root() / "converted" / f"{gguf_sha256[:24]}-v{CONVERTER_VERSION}"


def convert(gguf: Path, *, name: str, gguf_sha256: str | None = None) -> Path:
    """The converted folder of this file; made now unless a whole one is in the cache."""
    digest = gguf_sha256 or remembered_digest(gguf)
    target = converted_folder(digest)
    if is_complete(target):
        return target
    with exclusive(target.name):
        if not is_complete(target):
            header = read_header(gguf)
            say(f"Converting {gguf.name}; this happens once …")
            facts = {"name": name, "gguf": gguf.name, "gguf_sha256": digest, "gguf_type": header.main_type}
            build_folder(target, facts, lambda folder: _write_folder(gguf, header, folder))
    return target


def announce(folder: Path, quantization: str) -> None:
    """Say in the log what became of a quantized file's weights; nothing for a folder that was no such file."""
    kind = (read_manifest(folder) or {}).get("gguf_type", "F32")
    if kind in _FLOATS:
        return
    if quantization == "none":
        bits = 4 if kind.startswith(("Q4", "IQ4")) else 8
        line = "GGUF %s weights are dequantized to float32; --quantization int%d keeps them in %d bits"
        log.info(line, kind, bits, bits)
    else:
        log.info("GGUF %s weights are dequantized to float32, then stored as %s", kind, quantization)


def _write_folder(gguf: Path, header: GGUFHeader, folder: Path) -> None:
    import torch

    from cadenza.models.memory import require_memory

    needed = 4 * header.num_elements
    require_memory(needed, torch.device("cpu"), f"converting {gguf.name}")
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ModelError(
            f"converting {gguf.name} writes {needed / 1e9:.1f} GB to {cache_root()}, "
            f"where {free / 1e9:.1f} GB are free"
        )
    try:
        with _quiet_unless_terminal():
            write_tokenizer(gguf, header, folder)
            _write_weights(gguf, header, folder)
    except (ModelError, OSError, MemoryError):
        raise
    except (
        Exception
    ) as error:  # a damaged file fails in the readers' code, in as many ways as there are bytes
        raise ModelError(f"{gguf} cannot be converted: {one_line(error)}") from error


def _write_weights(gguf: Path, header: GGUFHeader, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # Not the file's own folder: what lies beside it there must not be taken for its configuration.
    config = AutoConfig.from_pretrained(str(folder), gguf_file=str(gguf.absolute()))
    try:
        model_class = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise ModelError(f"{gguf.name} is a {config.model_type} model, not a decoder-only one") from None
    with torch.device("meta"):
        model = model_class(config)
    tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    weights = _checked(tensors, model, gguf.name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = [model_class.__name__]
    config.dtype = torch.float32
    config.save_pretrained(folder)
    generation = GenerationConfig.from_model_config(config)
    generation.eos_token_id = end_ids(header) or generation.eos_token_id
    generation.save_pretrained(folder)


def _checked(tensors: dict[str, Any], model: Any, file_name: str) -> "dict[str, torch.Tensor]":
    """The tensors that the model wants, all of them, in its shapes; a tied one only under its main name."""
    wanted = dict(model.state_dict())
    for tied in model.all_tied_weights_keys:
        wanted.pop(tied, None)
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise ModelError(
            f"{file_name} lacks {len(missing)} tensors of its architecture, such as {missing[0]}"
        )
    for name, parameter in wanted.items():
        found, expected = list(tensors[name].shape), list(parameter.shape)
        if found != expected:
            raise ModelError(f"{file_name}: {name} has shape {found}, its architecture needs {expected}")
    return {name: tensors[name].float().contiguous() for name in wanted}


@contextlib.contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """The libraries draw progress bars on stderr; they belong on a terminal only."""
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        yield
