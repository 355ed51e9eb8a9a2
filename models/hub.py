"""Models of the Hugging Face hub, through huggingface_hub: `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` hold.

Fetches weights in safetensors, configuration and tokenizer, nothing else: pickles and Python code only when
they were asked for by name. Knows nothing of aliases or GGUF.
"""

from pathlib import Path

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


def _download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=list(IGNORED))
        )
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
