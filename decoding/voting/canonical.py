"""When two texts are the same answer: one canonical key for all ways to write it.

Numbers are compared as numbers, however they are written; other texts without regard to case, white space and the
punctuation around them. It does not know where a text comes from, nor JSON.
"""

import re
import unicodedata
from decimal import Decimal

_SPACE = re.compile(r"\s+")
_CURRENCY = "$€£¥₹"
_SIGN = rf"(?:[-+−]?[{_CURRENCY}]?|[{_CURRENCY}][-+−])"
_DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![.])\.[0-9]+)"
NUMBER = rf"{_SIGN}{_DIGITS}(?:[eE][-+]?[0-9]{{1,9}}(?![0-9]))?"
"""A number in a text: sign, currency, thousands in groups, fraction, exponent."""
_WHOLE_NUMBER = re.compile(NUMBER)
_NOT_NUMERIC = re.compile(rf"[{_CURRENCY},+]")
_BEFORE_DIGITS = "-.−"
"""Punctuation, or like it, that belongs to the number behind it."""
_LONGEST_PLAIN = 24
"""Digits up to which a number is written without an exponent."""


def one_line(text: str) -> str:
    return _SPACE.sub(" ", unicodedata.normalize("NFC", text)).strip()


def canonical_text(text: str) -> str:
    """The key of a text; empty only for white space. Equal numbers have equal keys: 42, 42.0, "$42." and 42 %."""
    text = one_line(text)
    return as_number(text) or _trimmed(text).casefold()


def as_number(text: str) -> str | None:
    """The key of a text that is nothing but a number, and its punctuation."""
    for candidate in (_trimmed(text, kept=_BEFORE_DIGITS), _trimmed(text)):
        if _WHOLE_NUMBER.fullmatch(candidate):
            return canonical_number(Decimal(_NOT_NUMERIC.sub("", candidate.replace("−", "-"))))
    return None


def canonical_number(number: Decimal) -> str:
    """One way to write a number exactly: without zeros that say nothing, with an exponent only where it is long."""
    sign, digits, exponent = number.as_tuple()
    text = "".join(map(str, digits)).lstrip("0")
    if not text:
        return "0"
    assert isinstance(exponent, int)  # neither infinite nor NaN: no number in a text is
    exponent += len(text) - len(text := text.rstrip("0"))
    minus = "-" if sign else ""
    if 0 <= exponent <= _LONGEST_PLAIN - len(text):
        return minus + text + "0" * exponent
    if exponent < 0 and max(len(text), -exponent) <= _LONGEST_PLAIN:
        whole = text[:exponent] or "0"
        return f"{minus}{whole}.{text[exponent:].rjust(-exponent, '0')}"
    return f"{minus}{text}e{exponent}"


def _trimmed(text: str, kept: str = "") -> str:
    """`text` less punctuation and spaces at both ends, up to the first of `kept`; all of it where nothing is left."""
    first, end = 0, len(text)
    while first < end and _is_trim(text[first]) and text[first] not in kept:
        first += 1
    while end > first and _is_trim(text[end - 1]):
        end -= 1
    return text[first:end] or text


def _is_trim(character: str) -> bool:
    return character == " " or unicodedata.category(character).startswith("P")
