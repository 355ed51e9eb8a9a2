"""Models of the Hugging Face hub, through huggingface_hub: `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` hold.

Fetches weights in safetensors, configuration and tokenizer, nothing else: pickles and Python code only when
they were asked for by name. Knows nothing of aliases or GGUF.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cadenza.models.errors import ModelError, one_line

TOKENIZER_AND_CONFIG = ("*.json", "*.jinja", "tokenizer*", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
# Other formats live in subfolders (onnx/, original/); consolidated files are a second copy of the weights.
IGNORED = ("*/*", "consolidated*.safetensors")


def snapshot(repo: str, *, revision: str | None, allow_pickle: bool, trust_remote_code: bool) -> Path:
    """The local snapshot of a repository; from the cache alone when offline."""
    patterns = [*TOKENIZER_AND_CONFIG, "*.safetensors"]
    if trust_remote_code:
        patterns.append("*.py")
    folder = _download(repo, revision, patterns)
    if allow_pickle and not any(folder.glob("*.safetensors")):
        folder = _download(repo, revision, [*patterns, "*.bin"])
    if not (folder / "config.json").is_file():
        raise ModelError(f"{repo} holds no config.json, so it is not a model that transformers can load")
    return folder


def files(repo: str, patterns: Sequence[str]) -> Path:
    """A local folder with the files of a repository that match, none of them in subfolders."""
    return _download(repo, None, [*patterns])


def cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """What the cache holds of a repository, whole or not; asks nobody."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def headers(
    repo: str, *, revision: str | None, trust_remote_code: bool
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """(a folder with the configuration, the table of tensors of each safetensors file); fetches no weights."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    folder = _download(repo, revision, ["config.json", *(["*.py"] if trust_remote_code else [])])
    with _errors(repo, revision):
        try:
            found = HfApi().get_safetensors_metadata(repo, revision=revision)
        except NotASafetensorsRepoError:
            raise ModelError(f"{repo} holds no safetensors; pull it to see what is in its files") from None
    return folder, {
        file: {
            name: {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": list(tensor.data_offsets),
            }
            for name, tensor in known.tensors.items()
        }
        for file, known in found.files_metadata.items()
    }


def _download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    with _errors(repo, revision):
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=list(IGNORED))
        )


@contextmanager
def _errors(repo: str, revision: str | None) -> Iterator[None]:
    """Whatever the hub's library raises inside the block becomes one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except ModelError:
        raise
    except GatedRepoError as error:
        raise ModelError(
            f"{repo} is gated: accept its terms on huggingface.co and set HF_TOKEN to a token of yours"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{repo} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{repo} is not an alias, not a local folder, and not on Hugging Face "
            "(or it is private and HF_TOKEN may not read it)"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelError(
            f"{repo} is neither an alias nor a local folder nor in the Hugging Face cache, "
            "and the hub cannot be reached (or HF_HUB_OFFLINE is set)"
        ) from error
    except HFValidationError as error:
        raise ModelError(f"{repo!r} is not a Hugging Face id: {one_line(error)}") from error
    except (
        Exception
    ) as error:  # HTTP libraries raise their own families; the user needs the reason, not a traceback
        raise ModelError(f"{repo} could not be fetched from Hugging Face: {one_line(error)}") from error


def cached() -> list[tuple[str, Path, int]]:
    """(id, snapshot folder, bytes on disk) of each model in the Hugging Face cache that could be served."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    found = []
    for repo in sorted(repos, key=lambda repo: repo.repo_id):
        for revision in sorted(repo.revisions, key=lambda revision: revision.last_modified, reverse=True):
            names = {file.file_name for file in revision.files}
            is_model = "config.json" in names and any(name.endswith(".safetensors") for name in names)
            if repo.repo_type == "model" and is_model:
                found.append((repo.repo_id, revision.snapshot_path, revision.size_on_disk))
                break
    return found
