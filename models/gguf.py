"""Turns a GGUF file, once, into a folder that loads like any other: config, float32 safetensors, tokenizer.

Dequantizing on every start would take tens of seconds; the converted folder loads in a fraction of one. The
reading and dequantizing is transformers' own; this module checks that nothing is missing afterwards. Knows
nothing of aliases or downloads.
"""

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cadenza.models.cache import build_folder, cache_root, exclusive, is_complete, say, sha256_of
from cadenza.models.errors import ModelError, one_line

if TYPE_CHECKING:
    import torch

CONVERTER_VERSION = 1
"""Part of the folder's name: raise it when the outcome of a conversion changes."""

DIGIT_SPLITTING = ("smollm", "starcoder", "refact", "command-r")
"""llama.cpp's names of the byte-level pre-tokenizers that cut numbers into digits first."""


def converted_folder(gguf_sha256: str) -> Path:
    """Where the conversion of the file with this digest is, or would be."""
    return cache_root() / "converted" / f"{gguf_sha256[:24]}-v{CONVERTER_VERSION}"


def convert(gguf: Path, *, name: str, gguf_sha256: str | None = None) -> Path:
    """The converted folder of this file; made now unless a whole one is in the cache."""
    digest = gguf_sha256 or _remembered_digest(gguf)
    target = converted_folder(digest)
    if is_complete(target):
        return target
    with exclusive(target.name):
        if not is_complete(target):
            say(f"Converting {gguf.name}; this happens once …")
            facts = {"name": name, "gguf": gguf.name, "gguf_sha256": digest}
            build_folder(target, facts, lambda folder: _write_folder(gguf, folder))
    return target


def _remembered_digest(gguf: Path) -> str:
    """SHA-256 of the file, computed again only when its size or time has changed: big files take a while."""
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{gguf} is not a GGUF file")
    stat = gguf.stat()
    key = f"{gguf.absolute()}:{stat.st_size}:{stat.st_mtime_ns}"
    notes = cache_root() / "digests.json"
    with exclusive("digests"):
        try:
            known: dict[str, str] = json.loads(notes.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        if key not in known:
            known[key] = sha256_of(gguf)
            notes.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return known[key]


def _write_folder(gguf: Path, folder: Path) -> None:
    try:
        with _quiet_unless_terminal():
            tokenizer_metadata = _write_weights(gguf, folder)
            _write_tokenizer(gguf, folder, tokenizer_metadata)
    except (ModelError, OSError, MemoryError):
        raise
    except (
        Exception
    ) as error:  # a damaged file fails in the readers' code, in as many ways as there are bytes
        raise ModelError(f"{gguf} cannot be read as a GGUF model: {one_line(error)}") from error


def _write_weights(gguf: Path, folder: Path) -> str | None:
    """Write config and weights; returns llama.cpp's name of the pre-tokenizer."""
    import torch
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    reader = GGUFReader(gguf)
    _require_disk(folder, 4 * sum(int(tensor.n_elements) for tensor in reader.tensors))
    pre = reader.get_field("tokenizer.ggml.pre")
    config = AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    try:
        model_class = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise ModelError(
            f"{gguf.name} is a {config.model_type} model, not a decoder-only language model"
        ) from None
    with torch.device("meta"):
        model = model_class(config)
    tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
    weights = _checked(tensors, model, gguf.name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = [model_class.__name__]
    config.dtype = torch.float32
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    return None if pre is None else str(pre.contents())


def _checked(tensors: dict[str, Any], model: Any, file_name: str) -> "dict[str, torch.Tensor]":
    """The tensors that the model wants, all of them, in its shapes; a tied one only under its main name."""
    wanted = dict(model.state_dict())
    for tied in model.all_tied_weights_keys:
        wanted.pop(tied, None)
    missing = sorted(wanted.keys() - tensors.keys())
    if missing:
        raise ModelError(
            f"{file_name} lacks {len(missing)} weights that its architecture needs, such as {missing[0]}"
        )
    for name, parameter in wanted.items():
        if tensors[name].shape != parameter.shape:
            raise ModelError(
                f"{file_name}: {name} has shape {list(tensors[name].shape)}, not {list(parameter.shape)}"
            )
    return {name: tensors[name].float().contiguous() for name in wanted}


def _write_tokenizer(gguf: Path, folder: Path, pre: str | None) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    backend = tokenizer.backend_tokenizer
    if pre in DIGIT_SPLITTING and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        # transformers falls back to GPT-2's splitting for these, which keeps the digits of a number together.
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    tokenizer.save_pretrained(folder)


def _require_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ModelError(
            f"converting needs {needed / 1e9:.1f} GB of disk in {cache_root()}, "
            f"where {free / 1e9:.1f} GB are free"
        )


@contextlib.contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """The libraries draw progress bars on stderr; they belong on a terminal only."""
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        yield
