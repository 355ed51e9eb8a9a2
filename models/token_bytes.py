"""The exact bytes that a vocabulary entry stands for in mid-text, read off the tokenizer's own decoder.

Text is cut into tokens at any byte, so constraints, log-probabilities and streaming need bytes, not strings.
Covers byte-level BPE, sentencepiece styles (▁, Metaspace, <0xXX> byte fallback), WordPiece, BPE with a
word-end suffix, and no decoder at all. Knows nothing of files or models.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from cadenza.models.errors import ModelError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def unicode_to_byte() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, inverted."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in kept}
    moved = (byte for byte in range(256) if byte not in set(kept))
    return table | {chr(256 + place): byte for place, byte in enumerate(moved)}


def token_to_bytes(decoder: Any) -> Callable[[str], bytes]:
    """How an ordinary token of this `tokenizers` decoder becomes bytes anywhere but at the text's start."""
    if decoder is None:
        return lambda token: f" {token}".encode()
    steps = _flatten(json.loads(decoder.__getstate__()))
    if any(step["type"] == "ByteLevel" for step in steps):
        return _byte_level(unicode_to_byte())
    return _text_steps(steps)


def _flatten(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if state["type"] == "Sequence":
        return [step for part in state["decoders"] for step in _flatten(part)]
    return [state]


def _byte_level(table: dict[str, int]) -> Callable[[str], bytes]:
    def convert(token: str) -> bytes:
        try:
            return bytes([table[character] for character in token])
        except KeyError:  # an added token that is written literally
            return token.encode()

    return convert


def _text_steps(steps: list[Mapping[str, Any]]) -> Callable[[str], bytes]:
    has_byte_fallback = any(step["type"] == "ByteFallback" for step in steps)
    rewrites = [rewrite for step in steps if (rewrite := _rewrite(step)) is not None]

    def convert(token: str) -> bytes:
        if has_byte_fallback and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for rewrite in rewrites:
            token = rewrite(token)
        return token.encode()

    return convert


def _rewrite(step: Mapping[str, Any]) -> Callable[[str], str] | None:
    """What one decoder step does to a token that is not the first."""
    match step["type"]:
        case "ByteFallback" | "Fuse" | "Strip":
            return None
        case "Replace" if "String" in step["pattern"]:
            old, new = step["pattern"]["String"], step["content"]
            return lambda token: token.replace(old, new)
        case "Metaspace":
            mark = step["replacement"]
            return lambda token: token.replace(mark, " ")
        case "WordPiece":
            prefix = step["prefix"]
            return lambda token: token[len(prefix) :] if token.startswith(prefix) else f" {token}"
        case "BPEDecoder":
            suffix = step["suffix"]
            return lambda token: token.replace(suffix, " ")
        case other:
            raise ModelError(f"the tokenizer's decoder has a step of type {other}, which is not supported")
