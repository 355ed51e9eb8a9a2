"""What is known of a model before any of its weights is read: configuration, headers, sizes.

Nothing is converted, and nothing fetched but configuration and headers. Knows nothing of memory or devices.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cadenza.models import fetch, gguf, hub
from cadenza.models.architecture import causal_lm_class, read_config
from cadenza.models.cache import is_complete
from cadenza.models.checkpoint import DTYPE_BYTES, Checkpoint, open_checkpoint
from cadenza.models.errors import ModelError, one_line
from cadenza.models.gguf_header import read_header
from cadenza.models.prequantized.detect import taken_format
from cadenza.models.source import HUB_ID, served_name


@dataclass(frozen=True)
class Outline:
    name: str
    location: str
    """A folder, a file, or where the hub has it."""
    checkpoint: Checkpoint
    """Its files may be elsewhere; their headers are known."""
    config: Any
    model_class: Any
    note: str | None = None
    """What happens to the weights on the way, if anything does."""
    quantized_by: str | None = None
    """The format that the checkpoint's weights are in; None: they are floats."""

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config(decoder=True)


class KnownHeaders(Checkpoint):
    """A checkpoint whose headers came another way than from its files."""

    def __init__(self, headers: dict[Path, dict[str, Any]]) -> None:
        super().__init__(tuple(headers))
        self.__dict__["headers"] = headers  # where the cached property keeps them


def outline(
    source: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Outline:
    """source: as for `load_model`. Raises `ModelError` where weights or configuration cannot be used."""
    path = Path(source).expanduser()
    if revision is not None and (source in fetch.ALIASES or path.exists()):
        raise ModelError(f"{source} has no revisions; they exist for Hugging Face ids only")
    if alias := fetch.ALIASES.get(source):
        converted = gguf.converted_folder(alias.gguf_sha256)
        if is_complete(converted):
            return _of_folder(source, converted, trust_remote_code, allow_pickle)
        if alias.gguf_path.is_file():
            return _of_gguf(source, alias.gguf_path)
        raise ModelError(f"{source} is not on this machine yet; `cadenza pull {source}` fetches it")
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {source}")
        return _of_gguf(served_name(source), path)
    if path.is_dir() and (path / "config.json").is_file():
        return _of_folder(served_name(source), path, trust_remote_code, allow_pickle)
    if path.exists() or not HUB_ID.fullmatch(source):
        raise ModelError(f"{source} is neither a folder with a config.json nor a .gguf file")
    return _of_hub(source, revision, trust_remote_code, allow_pickle)


def _of_folder(name: str, folder: Path, trust_remote_code: bool, allow_pickle: bool) -> Outline:
    checkpoint = open_checkpoint(folder, allow_pickle=allow_pickle)
    _ = checkpoint.headers  # damage is told before transformers is imported
    return _outline(name, str(folder), folder, checkpoint, trust_remote_code)


def _outline(
    name: str, location: str, folder: Path, checkpoint: Checkpoint, trust_remote_code: bool
) -> Outline:
    config = read_config(folder, trust_remote_code=trust_remote_code)
    stored_format = taken_format(config)
    model_class = causal_lm_class(config, trust_remote_code=trust_remote_code)
    if stored_format is None:
        return Outline(name, location, checkpoint, config, model_class)
    note = "its weights become floats as they are read, unless --quantization makes others of them"
    return Outline(name, location, checkpoint, config, model_class, note, stored_format.label)


def _of_gguf(name: str, file: Path) -> Outline:
    from transformers import AutoConfig, AutoModelForCausalLM

    header = read_header(file)
    try:
        config = AutoConfig.from_pretrained(str(file.parent), gguf_file=str(file.absolute()))
    except Exception as error:  # an unknown architecture, in as many ways as there are files
        raise ModelError(f"the configuration in {file} cannot be used: {one_line(error)}") from error
    try:
        model_class = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise ModelError(f"{file.name} is a {config.model_type} model, not a decoder-only one") from None
    count = header.num_elements
    described = {"all": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}}
    return Outline(
        name,
        str(file),
        KnownHeaders({file: described}),
        config,
        model_class,
        "GGUF: its tensors are dequantized to float32 once, when it is first served",
    )


def _of_hub(repo: str, revision: str | None, trust_remote_code: bool, allow_pickle: bool) -> Outline:
    folder = hub.cached_snapshot(repo, revision)
    if folder is not None and (folder / "config.json").is_file():
        try:
            return _of_folder(repo, folder, trust_remote_code, allow_pickle)
        except ModelError:  # of the snapshot there may be no more than an earlier plan fetched
            if any(folder.glob("*.safetensors")):
                raise
    folder, tensors = hub.headers(repo, revision=revision, trust_remote_code=trust_remote_code)
    headers = {Path(file): table for file, table in tensors.items()}
    types = {tensor["dtype"] for table in tensors.values() for tensor in table.values()}
    if unknown := sorted(types - DTYPE_BYTES.keys()):
        raise ModelError(f"{repo} holds tensors of type {unknown[0]}, which is not supported")
    return _outline(repo, f"huggingface.co/{repo}", folder, KnownHeaders(headers), trust_remote_code)
