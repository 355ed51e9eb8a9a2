"""Sets of characters that patterns name: shorthand classes, general categories, case variants.

Python and JavaScript disagree on most of them, so each comes in two readings: `narrow`, on which both agree that a
character belongs, and `wide`, which has every character that one of them takes in. A pattern uses narrow sets where
a larger set would match more, wide ones under a negation; what it then matches satisfies both languages.
Categories follow the interpreter's Unicode version.
"""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable
from functools import cache

from cadenza.decoding.constraints.automata.expression import ANY_CHAR, CharSet

_ASSIGNED = ((0, 0x40000), (0xE0000, 0xE1000))
"""Code points outside are private (the last two planes) or unassigned."""
_PRIVATE_PLANES = ((0xF0000, 0xFFFFD), (0x100000, 0x10FFFD))
_UNASSIGNED_REST = ((0x40000, 0xDFFFF), (0xE1000, 0xEFFFF), (0xFFFFE, 0xFFFFF), (0x10FFFE, 0x10FFFF))

_ASCII = {
    "d": CharSet.of([(0x30, 0x39)]),
    "w": CharSet.of([(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]),
    "s": CharSet.chars(" \t\n\r\f\v"),
}
_JAVASCRIPT_SPACE = CharSet.chars("\u00a0\ufeff\u2028\u2029")

_CATEGORY_NAMES = {
    "cased_letter": "LC", "close_punctuation": "Pe", "connector_punctuation": "Pc", "control": "Cc", "cntrl": "Cc",
    "currency_symbol": "Sc", "dash_punctuation": "Pd", "decimal_number": "Nd", "digit": "Nd",
    "enclosing_mark": "Me", "final_punctuation": "Pf", "format": "Cf", "initial_punctuation": "Pi", "letter": "L",
    "letter_number": "Nl", "line_separator": "Zl", "lowercase_letter": "Ll", "mark": "M", "combining_mark": "M",
    "math_symbol": "Sm", "modifier_letter": "Lm", "modifier_symbol": "Sk", "nonspacing_mark": "Mn", "number": "N",
    "open_punctuation": "Ps", "other": "C", "other_letter": "Lo", "other_number": "No", "other_punctuation": "Po",
    "other_symbol": "So", "paragraph_separator": "Zp", "private_use": "Co", "punctuation": "P", "punct": "P",
    "separator": "Z", "space_separator": "Zs", "spacing_mark": "Mc", "surrogate": "Cs", "symbol": "S",
    "titlecase_letter": "Lt", "unassigned": "Cn", "uppercase_letter": "Lu",
}  # fmt: skip


def shorthand(letter: str, *, wide: bool, ascii_only: bool = False) -> CharSet:
    """\\d, \\w or \\s, or with a capital letter what is not in them."""
    lower = letter.lower()
    if letter != lower:
        return shorthand(lower, wide=not wide, ascii_only=ascii_only).complement()
    return _unicode(lower) if wide and not ascii_only else _ASCII[lower]


@cache
def _unicode(letter: str) -> CharSet:
    ranges: list[tuple[int, int]] = []
    for first, end in _ASSIGNED:
        found = re.finditer(rf"\{letter}+", "".join(map(chr, range(first, end))))
        ranges += [(first + match.start(), first + match.end() - 1) for match in found]
    return CharSet.of(ranges).union(_JAVASCRIPT_SPACE) if letter == "s" else CharSet.of(ranges)


def category(name: str) -> CharSet | None:
    """The characters of a general category, by short or long name; None if there is none of that name."""
    name = re.sub(r"(?i)^(gc|general_?category)[=:]", "", name.strip())
    if name.lower() in ("any", "ascii"):
        return ANY_CHAR if name.lower() == "any" else CharSet.of([(0, 0x7F)])
    key = name.lower().replace(" ", "_").replace("-", "_")
    short = _CATEGORY_NAMES.get(key, name.replace("&", "C")).capitalize()
    by_name = _categories()
    if short == "Lc":
        return _union(by_name[part] for part in ("Lu", "Ll", "Lt"))
    if short == "Cs":
        return CharSet(())
    if len(short) == 1 and any(part[0] == short for part in by_name):
        return _union(ranges for part, ranges in by_name.items() if part[0] == short)
    return CharSet.of(by_name[short]) if short in by_name else None


@cache
def _categories() -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {"Co": list(_PRIVATE_PLANES), "Cn": list(_UNASSIGNED_REST)}
    for first, end in _ASSIGNED:
        start, current = first, unicodedata.category(chr(first))
        for code in range(first + 1, end):
            following = unicodedata.category(chr(code))
            if following != current:
                found.setdefault(current, []).append((start, code - 1))
                start, current = code, following
        found.setdefault(current, []).append((start, end - 1))
    return found


def _union(parts: Iterable[list[tuple[int, int]]]) -> CharSet:
    return CharSet.of(char_range for part in parts for char_range in part)


def fold_case(char_set: CharSet, *, wide: bool) -> CharSet:
    """With the case variants of its members: narrow, the other half of pairs that map to each other and are both
    ASCII or both not; wide, everything that upper, lower or folded forms connect."""
    if char_set.ranges and char_set.ranges[-1][1] < 0x80 and not wide:
        swapped = "".join(
            chr(c) for first, last in char_set.ranges for c in range(first, last + 1)
        ).swapcase()
        return char_set.union(CharSet.chars(swapped))
    starts = [first for first, _ in char_set.ranges]
    extra: list[tuple[int, int]] = []
    for code, variants in _case_variants(wide).items():
        place = bisect_right(starts, code) - 1
        if place >= 0 and code <= char_set.ranges[place][1]:
            extra += [(variant, variant) for variant in variants]
    return char_set.union(CharSet.of(extra))


@cache
def _case_variants(wide: bool) -> dict[int, set[int]]:
    variants: dict[int, set[int]] = {}
    for code in range(0x20000):
        character = chr(code)
        lower, upper = character.lower(), character.upper()
        if lower == upper == character:
            continue
        if not wide:
            other = upper if upper != character else lower
            paired = (
                len(other) == 1 and other.swapcase() == character and other.isascii() == character.isascii()
            )
            if paired and other.lower() == lower and other.upper() == upper:
                variants[code] = {ord(other)}
            continue
        group = {code}
        for form in (lower, upper, character.title(), character.casefold(), lower.upper(), upper.lower()):
            if len(form) == 1:
                group |= variants.get(ord(form), {ord(form)})
        _connect(variants, group)
    if (
        wide
    ):  # what single-character mappings do not tell: dotted and dotless i, sharp s, and the re module's own
        for characters in ("iI\u0130\u0131", "\u00df\u1e9e", "\ufb05\ufb06", "\u0390\u1fd3", "\u03b0\u1fe3"):
            _connect(variants, {ord(c) for c in characters})
    return variants


def _connect(variants: dict[int, set[int]], group: set[int]) -> None:
    whole = group.union(*(variants.get(code, ()) for code in group))
    for code in whole:
        variants[code] = whole
