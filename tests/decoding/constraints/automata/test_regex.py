"""Patterns against Python's own matchers, on random texts and on matches with a character changed."""

import random
import re

import pytest
import regex

from cadenza.decoding.constraints.automata.build import is_subset, to_dfa
from cadenza.decoding.constraints.automata.dfa import DFA
from cadenza.decoding.constraints.automata.regex import parse_regex
from cadenza.decoding.constraints.errors import ConstraintError
from cadenza.decoding.constraints.limits import Effort

SAME_IN_BOTH = [
    r"a*b+c?", r"(ab|cd)*", r"\d{4}-\d{2}-\d{2}", r"[a-z]+@[a-z]+(\.[a-z]{2,3})+", r"^foo$", r"^a|b$", r"(^a|b)c",
    r"(?:^|,)x", r"x(?:$|,)y?", r"\bfoo\b", r"\Boo\B", r"a\b.*", r".*\bx", r"(?!ab)[ab]+", r"(?:\b|a)b", r"\B", r"x?",
    r"(?=.*\d)(?=.*[a-z])[a-z\d]{2,4}", r"(?<=a)b", r"a(?<=a)b", r"(?<!a)b.*", r".*(?<=ab)$", r"[^\d]x", r"\D\S\W",
    r"(?i:a)b", r"(?s:.)a.", r"a\n?", r"a{2,3}?b", r"a{2}", r"a{", r"a{1,x}", r"[a\-z]", r"[a-]+", r"\x41\u0042",
    r"\.\*\\", r"(?<n>a)b", r"(a(?=b)|b){1,3}", r"((?!b)a|b$){1,2}", r"", r"()", r"a||b", r"\n\t", r"[\w.]+-\w",
    r"[^\W\d]+", r"(?!\d)\w+", r"(?=^a)ab|x", r"(?<!^)b", r"x*(?<![ax])b", r"(?=a$)a", r"(?!.*b$)[ab]+", r"[^\s]+ \s",
    r"(?=)", r"(?!)a|b", r"é+[à-ü]", r"(x+x+)+,", r"(a|b)*a(a|b){3}", r"(?:[ab]|c{2})+?", r"a(?!$)", r"(?:^a)?b",
    r"(?m:^a$\nb)", r"(?m:.*^b$.*)", r"x\\?(?=,|$).*", r"^(?:(?!ab).)*$", r"^(?:(?!ab)[abc])*(?:ca|b[abx])$",
    r"^c(?:(?!cc)[^,])+cc$", r"^(?:.(?=a|b))*b$",
    r"^((?!b|ca|$)[abc])+$", r"^(?:[abc](?!ab|$))*$", r"^((?!x))(?:(?=a|b).(?!c))*$", r"(?=a(?!b))a.*", r"]|}", r"\/\-",
]  # fmt: skip
PYTHON_ONLY = [
    r"(?i)aBc[x-z]", r"(?s).a.", r"(?m)^a$\nb", r"(?m).*^b$.*", r"a$\n?", r"a\Z", r"\Aa\Z", r"a{,2}b", r"[]a]+",
    r"[^]a]+", r"(?x) a  b # c", r"(?x)[ #]\ a", r"(?P<n>a)b", r"(?=a\Z)a", r".*(?<!ab)", r"(?i)[^k]", r"(?i)k+ſ?",
    r"(?i)[^a-s]", r"\101\060[\1]*", r"\N{LATIN SMALL LETTER A}b", r"(?a)\w[^\W]\B", r"(?#comment)a", r"[\b]?a",
]  # fmt: skip
ALPHABET = "aabbcxyzo,.-@ \n0129AKkſé٣\u212a_\r\\]}"


def dfa_of(pattern: str, dialect: str, *, unanchored: bool = False, negated: bool = False) -> DFA:
    expression = parse_regex(pattern, dialect, Effort(), unanchored=unanchored, negated=negated)  # type: ignore[arg-type]
    return to_dfa(expression, Effort())


def texts(dfa: DFA, seed: int) -> set[str]:
    chance = random.Random(seed)
    found = {"".join(chance.choices(ALPHABET, k=chance.randint(0, 6))) for _ in range(150)}
    found |= {"".join(chance.choices("ab\nfocx,", k=chance.randint(0, 5))) for _ in range(150)}
    for _ in range(0 if dfa.is_empty else 25):
        text = random_match(dfa, chance)
        found.add(text)
        for _ in range(4):
            place = chance.randint(0, len(text))
            found.add(text[:place] + chance.choice(ALPHABET) + text[place + chance.randint(0, 1) :])
    return found


def random_match(dfa: DFA, chance: random.Random) -> str:
    state, text = 0, bytearray()
    while len(text) < 30 and not (dfa.accepting[state] and chance.random() < 0.3):
        likely = [b for b in b"abcxyzo,019 \n" if dfa.next(state, b) >= 0]
        ways = (
            likely if likely and chance.random() < 0.8 else [b for b in range(256) if dfa.next(state, b) >= 0]
        )
        if not ways:
            break
        text.append(chance.choice(ways))
        state = dfa.next(state, text[-1])
    return (bytes(text) + dfa.shortest(state)).decode("utf-8", "strict")


def read_differently(text: str) -> bool:
    """Texts on which Python and JavaScript may disagree; of those, we match no more than Python does."""
    return not text.isascii() or "\r" in text or text.endswith("\n") or not text


@pytest.mark.parametrize("pattern", SAME_IN_BOTH + PYTHON_ONLY)
def test_whole_text_as_fullmatch(pattern: str) -> None:
    module = regex if "(?<n>" in pattern else re
    dfa = dfa_of(pattern, "python")
    for text in texts(dfa, 1):
        matches = module.fullmatch(pattern, text) is not None
        accepted = dfa.accepts(text.encode())
        assert accepted == matches or (matches and not text.isascii()), text


@pytest.mark.parametrize("pattern", SAME_IN_BOTH)
@pytest.mark.parametrize("unanchored", [True, False])
def test_ecma_as_python_where_they_agree(pattern: str, unanchored: bool) -> None:
    module = regex if "(?<n>" in pattern else re
    ask = module.search if unanchored else module.fullmatch
    dfa = dfa_of(pattern, "ecma", unanchored=unanchored)
    for text in texts(dfa, 2):
        matches = ask(pattern, text) is not None
        accepted = dfa.accepts(text.encode())
        assert accepted == matches or (matches and read_differently(text)), text


@pytest.mark.parametrize("pattern", SAME_IN_BOTH)
def test_negated_reading_matches_whatever_either_language_does(pattern: str) -> None:
    if pattern == r".*(?<=ab)$":
        pytest.skip("$ may stand before a newline in this reading, and then no lookbehind ends the text")
    narrow = dfa_of(pattern, "ecma", unanchored=True)
    wide = dfa_of(pattern, "ecma", unanchored=True, negated=True)
    assert is_subset(narrow, wide, Effort())
    module = regex if "(?<n>" in pattern else re
    for text in texts(wide, 3):
        if module.search(pattern, text):
            assert wide.accepts(text.encode()), text


@pytest.mark.parametrize(
    "pattern", [r"\w+", r"\d", r"\s", r"(?i)[a-zé]+", r"\W", r"\D", r"\S", r"[^\w\s]", r"(?i)[^sk]"]
)
def test_classes_never_exceed_python(pattern: str) -> None:
    """Every character of the basic plane and some beyond; ASCII exactly but for Python's separators 1C to 1F."""
    dfa = dfa_of(pattern, "python")
    matcher = re.compile(pattern)
    for code in [*range(0xD800), *range(0xE000, 0x11000), *range(0x1D7C0, 0x1E000)]:
        accepted = dfa.accepts(chr(code).encode())
        matches = matcher.fullmatch(chr(code)) is not None
        assert accepted == matches or (matches and (code > 0x7F or 0x1C <= code < 0x20)), hex(code)


@pytest.mark.parametrize("letter", ["d", "w", "s"])
def test_negated_shorthands_exclude_all_that_either_language_takes_in(letter: str) -> None:
    dfa = dfa_of(rf"\{letter.upper()}", "ecma")
    for code in [*range(0xD800), *range(0xE000, 0x40000)]:
        excluded = re.fullmatch(rf"\{letter}", chr(code)) or (
            letter == "s" and code in (0xA0, 0xFEFF, 0x2028)
        )
        assert dfa.accepts(chr(code).encode()) == (not excluded), hex(code)


def test_case_variants_cover_pythons() -> None:
    """Negated sets without regard to case exclude every variant that `re` knows of any ASCII letter."""
    for letter in "abcdefghijklmnopqrstuvwxyzåσßµǆ":
        excluded = dfa_of(f"(?i)[^{letter}]", "python")
        included = dfa_of(f"(?i){letter}", "python")
        matcher = re.compile(f"(?i){letter}")
        for code in [*range(0x600), *range(0x1C80, 0x2200), *range(0xFB00, 0xFB10)]:
            text = chr(code).encode()
            if matcher.fullmatch(chr(code)):
                assert not excluded.accepts(text), (letter, hex(code))
            else:
                assert not included.accepts(text), (letter, hex(code))
        assert included.accepts(letter.encode())


@pytest.mark.parametrize(
    "name",
    ["L", "Lu", "Letter", "Nd", "gc=Ll", "General_Category=Sc", "LC", "Zs", "Punctuation", "Cc", "Co", "Mn"],
)
def test_general_categories(name: str) -> None:
    dfa, outside = dfa_of(rf"\p{{{name}}}", "ecma"), dfa_of(rf"\P{{{name}}}", "ecma")
    matcher = regex.compile(rf"\p{{{name}}}")
    assigned = regex.compile(r"\p{Cn}")
    disagree = 0
    for code in [*range(0x3000), *range(0xD7A0, 0xD800), *range(0xE000, 0xE010), *range(0x1F000, 0x1F800)]:
        text = chr(code)
        assert dfa.accepts(text.encode()) != outside.accepts(text.encode())
        if not assigned.match(text):
            disagree += dfa.accepts(text.encode()) != bool(matcher.match(text))
    assert disagree <= 60  # characters that a later version of Unicode assigned or moved


REFUSED = [
    (r"(a)\1", "python", "a backreference", 3),
    (r"(?P<x>a)(?P=x)", "python", "a backreference", 8),
    (r"(?<x>a)\k<x>", "ecma", "a backreference", 7),
    (r"a++", "python", "a possessive quantifier", 1),
    (r"(?>a)", "python", "an atomic group", 0),
    (r"(?(1)a|b)", "python", "a conditional", 0),
    (r"(?R)", "python", "recursion", 0),
    (r"b(?1)", "python", "recursion", 1),
    (r"(?)a", "python", "this kind of group", 0),
    (r"(?|a)", "python", "a branch reset", 0),
    (r"(?:ab(?!c))+", "ecma", "an assertion inside a repetition", 11),
    (r"(?:(?!c).)*a+", "ecma", "a lookahead inside a repetition", 10),
    (r"ab{3,2}", "ecma", "wrong way round", 2),
    (r"(?<=ab)c", "ecma", "a lookbehind of more than one character", 0),
    (r"(?<=\b)a", "python", "an assertion inside a lookbehind", 0),
    (r"[[:alpha:]]", "ecma", "a POSIX class", 1),
    (r"\p{Script=Greek}", "ecma", "no general category", 0),
    (r"(?L)a", "python", "the flag L", 0),
    (r"a(?i)b", "python", "at its start", 1),
    (r"a)", "ecma", "no group to close", 1),
    (r"x(a", "ecma", "not closed", 1),
    (r"x[a", "ecma", "not closed", 1),
    (r"a|*", "python", "nothing to repeat", 2),
    (r"^*", "python", "nothing to repeat", 1),
    (r"a**", "python", "nothing to repeat", 2),
    (r"a{,3}", "ecma", "counts from zero", 1),
    (r"a\q", "ecma", "escape", 1),
    (r"\xg1", "ecma", "hexadecimal", 0),
    (r"\u{110000}", "ecma", "code point", 0),
    ("a\\", "ecma", "ends too early", 2),
    (r"[z-a]", "python", "wrong way round", 1),
    (r"[\w-z]", "python", "a range has a class", 1),
]


@pytest.mark.parametrize(("pattern", "dialect", "reason", "position"), REFUSED)
def test_refusals_name_the_construct_and_its_place(
    pattern: str, dialect: str, reason: str, position: int
) -> None:
    with pytest.raises(ConstraintError, match=re.escape(reason)) as caught:
        dfa_of(pattern, dialect)
    assert caught.value.where == f"position {position}"


def test_half_of_a_surrogate_pair_is_no_character() -> None:
    assert dfa_of(r"\ud83dx\udE00", "ecma").is_empty
    assert dfa_of(r"[\ud800-\udfff]|a", "ecma").num_states == 2


def test_ecma_only_syntax() -> None:
    assert dfa_of(r"[^]", "ecma").accepts(b"\n")
    assert dfa_of(r"a[]|b", "ecma").num_states == 2
    assert dfa_of(r"\u{1F600}\uD83D\uDE00\cJ", "ecma").accepts("😀😀\n".encode())
    assert dfa_of(r"[\w-.]+", "ecma").accepts(b"a-.")
    assert not dfa_of(r"^a$", "ecma", unanchored=True).accepts(b"a\n")
    assert not dfa_of(r".", "ecma").accepts("\u2028".encode())


def test_unanchored_texts_need_no_more_than_the_pattern() -> None:
    assert dfa_of("[a-z]{1,1000}", "ecma", unanchored=True).num_states < 20
    assert dfa_of("^[a-z]{1,1000}$", "ecma", unanchored=True).num_states == 1001
