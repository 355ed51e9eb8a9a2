"""What the model's author recommends for generation: the tokens that end a text, and sampling defaults.

Knows nothing of requests: a request's own fields win over these, in the server.
"""

import json
from pathlib import Path
from typing import Any

from cadenza.models.errors import ModelError

FILE_NAME = "generation_config.json"
SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
)


def read_generation_config(path: Path) -> dict[str, Any]:
    """The file, or the one in the folder; empty if the folder has none."""
    file = path / FILE_NAME if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"the generation config {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"the generation config {file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"the generation config {file} is not a JSON object")
    return content


def sampling_defaults(content: dict[str, Any], file: str) -> dict[str, float | int]:
    """The sampling parameters in force.

    `do_sample: false` says that the author's default is greedy: then the parameters of sampling are void.
    """
    found: dict[str, float | int] = {}
    for name in SAMPLING_FIELDS:
        value = content.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelError(f"{name} in {file} is {value!r}, not a number")
        found[name] = value
    if content.get("do_sample") is False:
        penalty = found.get("repetition_penalty")
        return {"temperature": 0.0} | ({} if penalty is None else {"repetition_penalty": penalty})
    return found


def eos_ids(*candidates: Any) -> tuple[int, ...]:
    """The first candidate (an id, a list of ids, or None) that names any token."""
    for candidate in candidates:
        ids = candidate if isinstance(candidate, list | tuple) else [candidate]
        if numbers := tuple(dict.fromkeys(int(value) for value in ids if value is not None)):
            return numbers
    return ()
