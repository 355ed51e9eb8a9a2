"""From what a request or the operator calls an adapter to a local folder that holds it, by policy.

Requests reach folders below allowed roots, and Hugging Face ids of an allow list; the operator's own command line may
name anything. Looks at the names of files, never into them, and does not say what lies outside the roots.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cadenza.models import hub
from cadenza.models.errors import ModelError, one_line

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FETCHED = (
    CONFIG,
    WEIGHTS,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.jinja",
)
"""Of a repository on the hub: what an adapter may consist of."""

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")
_ALLOWED_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/([A-Za-z0-9][A-Za-z0-9_.-]*|\*)")
_TEMPLATES = "additional_chat_templates"


class AdapterPathError(ModelError):
    """Adapters are not loaded from there. Says the same of what exists and of what does not."""


@dataclass(frozen=True, slots=True)
class AdapterSources:
    """Where adapters may come from at run time; nothing at all is nowhere."""

    roots: tuple[Path, ...] = ()
    hub_ids: tuple[str, ...] = ()
    """`org/name`, or `org/*` for all of an organisation."""

    def __post_init__(self) -> None:
        for allowed in self.hub_ids:
            if not _ALLOWED_ID.fullmatch(allowed):
                raise ModelError(f"{allowed!r} is no Hugging Face id of an adapter; write org/name, or org/*")

    def locate(self, spec: str) -> Path:
        """The real folder, all links resolved. A folder below a root wins over a Hugging Face id of that name.

        Raises AdapterPathError; ModelError where the place is allowed and holds no adapter. May fetch from the hub.
        """
        if not self.roots and not self.hub_ids:
            raise AdapterPathError(
                "no place is allowed to load adapters from; --lora-allowed-roots and --lora-allowed-hub-ids name some"
            )
        found = list(self._below_roots(spec))
        for root, folder in found:
            if _is_folder(folder):
                return _checked(folder, spec, root)
        if self._is_allowed_id(spec):
            return _fetched(spec)
        if found and not _HUB_ID.fullmatch(spec):
            raise ModelError(f"there is no folder {spec!r}")
        raise AdapterPathError(
            f"{spec!r} is neither a folder below those that adapters may be loaded from (--lora-allowed-roots) nor a "
            "Hugging Face id that is allowed (--lora-allowed-hub-ids)"
        )

    def _below_roots(self, spec: str) -> Iterator[tuple[Path, Path]]:
        """(root, place that the spec names and that lies there), both real; relative paths are those below a root."""
        for root in self.roots if spec else ():
            try:
                real = root.expanduser().resolve()
                place = (real / spec).resolve()
            except (OSError, RuntimeError, ValueError):  # a loop of links, a null byte: not a path at all
                continue
            if place.is_relative_to(real):
                yield real, place

    def _is_allowed_id(self, spec: str) -> bool:
        organisation = spec.split("/")[0]
        return bool(_HUB_ID.fullmatch(spec)) and (spec in self.hub_ids or f"{organisation}/*" in self.hub_ids)


def locate_trusted(spec: str) -> Path:
    """For what the operator has written: any local folder, or else a Hugging Face id. Raises ModelError."""
    folder = Path(spec).expanduser()
    if _is_folder(folder):
        return _checked(folder.resolve(), spec, None)
    if not _HUB_ID.fullmatch(spec):
        raise ModelError(f"there is no folder {spec!r}")
    return _fetched(spec)


def _fetched(repo: str) -> Path:
    # its files are links into the hub's own cache
    return _checked(hub.files(repo, FETCHED), repo, None)


def _checked(folder: Path, spec: str, root: Path | None) -> Path:
    """A folder that holds what an adapter needs, and nothing that leads out of the root."""
    try:
        if root is not None:
            _check_entries(folder, spec, root)
        missing = next((name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()), None)
        pickles = sorted(file.name for file in folder.glob("*.bin"))
    except OSError as error:
        raise ModelError(f"{spec!r} cannot be read: {error.strerror or one_line(error)}") from error
    if missing == CONFIG:
        raise ModelError(f"{spec!r} holds no {CONFIG}, so it is not an adapter that PEFT has saved")
    if missing == WEIGHTS:
        found = f"{pickles[0]}, which is a pickle, and " if pickles else ""
        raise ModelError(f"{spec!r} holds {found}no {WEIGHTS}; only safetensors are read")
    return folder


def _check_entries(folder: Path, spec: str, root: Path) -> None:
    """Only files and folders, all really below the root: a link could point anywhere, and a pipe waits for ever."""
    templates = folder / _TEMPLATES
    places = [*folder.iterdir(), *(templates.iterdir() if templates.is_dir() else ())]
    for place in places:
        try:
            is_below = place.resolve().is_relative_to(root)
        except RuntimeError:  # links in a loop
            is_below = False
        if not is_below:
            raise AdapterPathError(
                f"{place.name!r} in {spec!r} is a link that leads to where adapters may not be loaded from"
            )
        if not (place.is_file() or place.is_dir()):
            raise ModelError(f"{place.name!r} in {spec!r} is neither a file nor a folder")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # no permission, or too long a name
        return False
