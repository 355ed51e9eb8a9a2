"""Text that leaves in pieces is the text as a whole: no broken character, no leaked or missed stop string."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cadenza.decoding.detokenizer import Decoder, IncrementalDetokenizer, StopStringFilter, TextStream
from cadenza.models import LoadedModel, Tokenizer

TEXTS = {
    "plain": "The quick brown fox jumps over the lazy dog.",
    "emoji": "Good 🌞 morning 👩‍👩‍👧‍👦! 🇫🇷🏳️‍🌈 done",
    "cjk": "床前明月光，疑是地上霜。吾輩は猫である。안녕하세요",
    "combining": "e\u0301a\u0308o\u0302 \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "rare": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0001f9ff \U00020bb7 ꙮ",
    "spaces": "  two  spaces\n\n\ttabs \r\n end ",
    "a replacement character": "before \ufffd after",
    "begins and ends with emoji": "🎉🎉",
}


class ByteDecoder:
    """Token ids stand for byte strings; decoding replaces what is not UTF-8, as byte-level tokenizers do."""

    def __init__(self, tokens: list[bytes]) -> None:
        self._tokens = tokens

    def decode(self, ids: object, *, skip_special_tokens: bool = True) -> str:
        assert isinstance(ids, list)
        return b"".join(self._tokens[token_id] for token_id in ids).decode(errors="replace")


@pytest.fixture(scope="module")
def tokenizer(smollm2: LoadedModel) -> Tokenizer:
    return smollm2.tokenizer


def text_stream(
    decoder: Decoder, stop: tuple[str, ...] = (), *, include: bool = False, prompt: tuple[int, ...] = ()
) -> TextStream:
    return TextStream(IncrementalDetokenizer(decoder, prompt, True), StopStringFilter(stop, include))


def deltas(stream: TextStream, ids: list[int]) -> list[str]:
    """What each token makes certain, until a stop string is found; then what is held back."""
    found: list[str] = []
    for token_id in ids:
        found.append(stream.push(token_id))
        if stream.stop_string is not None:
            break
    return [*found, stream.flush()]


# whole characters


@pytest.mark.parametrize("name", TEXTS)
def test_deltas_join_to_the_text(name: str, tokenizer: Tokenizer):
    ids = tokenizer.encode(TEXTS[name], add_special_tokens=False)
    pieces = deltas(text_stream(tokenizer), ids)
    assert "".join(pieces) == tokenizer.decode(ids) == TEXTS[name]
    if "\ufffd" not in TEXTS[name]:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("length", [1, 3, 8])
def test_deltas_after_a_prompt_that_ends_anywhere(name: str, length: int, tokenizer: Tokenizer):
    """Also in mid-character: the character then belongs to the answer, and comes out whole."""
    ids = tokenizer.encode(TEXTS[name], add_special_tokens=False)
    prompt, answer = ids[:length], ids[length:]
    if not answer:
        return
    known = tokenizer.decode(prompt).rstrip("\ufffd")
    pieces = deltas(text_stream(tokenizer, prompt=tuple(prompt)), answer)
    assert known + "".join(pieces) == TEXTS[name]


def test_a_character_comes_out_with_its_last_byte():
    decoder = ByteDecoder([bytes([byte]) for byte in "a🌞b".encode()])
    assert deltas(text_stream(decoder), [0, 1, 2, 3, 4, 5]) == ["a", "", "", "", "🌞", "b", ""]


def test_an_unfinished_character_is_flushed_as_a_replacement_character():
    decoder = ByteDecoder([b"a", "🌞".encode()[:2]])
    assert deltas(text_stream(decoder), [0, 1]) == ["a", "", "\ufffd"]


def test_bytes_that_can_never_be_a_character_come_out_once_something_follows():
    decoder = ByteDecoder([b"a", b"\xff", b"b"])
    assert deltas(text_stream(decoder), [0, 1, 1, 2]) == ["a", "", "", "\ufffd\ufffdb", ""]


def test_special_tokens_are_skipped_or_shown(tokenizer: Tokenizer):
    (special,) = tokenizer.encode("<|im_end|>")
    ids = [*tokenizer.encode("one"), special, *tokenizer.encode(" two")]
    shown = TextStream(IncrementalDetokenizer(tokenizer, (), False), StopStringFilter((), False))
    assert "".join(deltas(text_stream(tokenizer), ids)) == "one two"
    assert "".join(deltas(shown, ids)) == "one<|im_end|> two"


def test_a_fork_goes_its_own_way():
    decoder = ByteDecoder([bytes([byte]) for byte in "x🌞éy".encode()])
    first = text_stream(decoder, ("yy",))
    assert first.push(0) == "x"
    assert first.push(1) == ""
    second = first.fork()
    assert [first.push(token) for token in (2, 3, 4)] == ["", "", "🌞"]
    assert second.push(0) == "\ufffdx"
    assert first.push(7) + first.flush() == "y"
    assert second.flush() == ""


# stop strings

STOP_CASES: dict[str, tuple[list[str], tuple[str, ...], bool, list[str], str | None]] = {
    # name: (tokens, stop strings, include, deltas, stop string found)
    "none": (["ab", "cd"], (), False, ["ab", "cd", ""], None),
    "within a token": (["ab", "cXd"], ("X",), False, ["ab", "c", ""], "X"),
    "straddles three tokens": (["aS", "TO", "Pb"], ("STOP",), False, ["a", "", "", ""], "STOP"),
    "included": (["aS", "TO", "Pb"], ("STOP",), True, ["a", "", "STOP", ""], "STOP"),
    "half a match goes on otherwise": (["aS", "TO", "Ob"], ("STOP",), False, ["a", "", "STOOb", ""], None),
    "half a match at the end": (["aS", "TO"], ("STOP",), False, ["a", "", "STO"], None),
    "a match restarts inside itself": (["aab", "aac", "!"], ("aac",), False, ["aab", "", ""], "aac"),
    "the first to end wins": (["xab", "cd"], ("abcd", "bc"), False, ["x", "a", ""], "bc"),
    "two end together: the longer": (["xab", "c"], ("bc", "abc"), False, ["x", "", ""], "abc"),
    "one is the other's beginning": (["xa", "bc"], ("ab", "abc"), False, ["x", "", ""], "ab"),
    "at the very start": (["STOP", "b"], ("STOP",), False, ["", ""], "STOP"),
    "newlines": (["a\n", "\nb"], ("\n\n",), False, ["a", "", ""], "\n\n"),
    "an emoji": (["a", "🌞", "b"], ("🌞",), False, ["a", "", ""], "🌞"),
}


@pytest.mark.parametrize("name", STOP_CASES)
def test_stop_strings(name: str):
    tokens, stop, include, expected, found = STOP_CASES[name]
    stream = text_stream(ByteDecoder([token.encode() for token in tokens]), stop, include=include)
    assert deltas(stream, list(range(len(tokens)))) == expected
    assert stream.stop_string == found


def test_a_stop_string_that_only_the_flush_completes():
    """The stop string is a replacement character: the broken end of the text becomes one."""
    stream = text_stream(ByteDecoder([b"a", b"\xf0\x9f"]), ("\ufffd",))
    assert deltas(stream, [0, 1]) == ["a", "", ""]
    assert stream.stop_string == "\ufffd"


def test_stop_strings_are_plain_text_while_the_answer_may_not_end():
    stream = text_stream(ByteDecoder([b"a!b", b"!", b"c!"]), ("!",))
    assert stream.push(0, may_stop=False) == "a!b"
    assert stream.push(1, may_stop=False) == "!"
    assert stream.stop_string is None
    assert stream.push(2) == "c"
    assert stream.stop_string == "!"


# properties: any text, cut into tokens at any byte, is one text

ALPHABET = "ab \n.é漢🌞\u0301"
texts = st.text(alphabet=ALPHABET, max_size=24)
stops = st.lists(st.text(alphabet=ALPHABET, min_size=1, max_size=4), max_size=3).map(tuple)


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, list[bytes]]:
    text = draw(texts)
    data = text.encode()
    cuts = sorted(draw(st.sets(st.integers(0, len(data)), max_size=16)) | {0, len(data)})
    return text, [data[start:end] for start, end in pairwise(cuts)]


def up_to_first_stop(text: str, stop: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    """Read one character after the other; of stop strings that end at the same one, the longest counts."""
    for end in range(1, len(text) + 1):
        ending = [each for each in stop if text[:end].endswith(each)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@settings(max_examples=400, deadline=None, derandomize=True)
@given(cut_texts(), stops, st.booleans())
def test_any_cut_gives_the_text_up_to_the_first_stop(
    cut: tuple[str, list[bytes]], stop: tuple[str, ...], include: bool
):
    text, tokens = cut
    stream = text_stream(ByteDecoder(tokens), stop, include=include)
    pieces = deltas(stream, list(range(len(tokens))))
    expected, found = up_to_first_stop(text, stop, include)
    assert "".join(pieces) == expected
    assert stream.stop_string == found
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cut_texts(), stops)
def test_what_has_gone_out_is_never_taken_back(cut: tuple[str, list[bytes]], stop: tuple[str, ...]):
    """After each token, what went out is the beginning of the final text; no stop string is in it."""
    text, tokens = cut
    stream = text_stream(ByteDecoder(tokens), stop)
    expected, _ = up_to_first_stop(text, stop, False)
    out = ""
    for token_id in range(len(tokens)):
        out += stream.push(token_id)
        assert expected.startswith(out)
        if stream.stop_string is not None:
            break


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cut_texts(), st.integers(0, 16))
def test_any_prompt_any_cut(cut: tuple[str, list[bytes]], length: int):
    text, tokens = cut
    decoder = ByteDecoder(tokens)
    ids = list(range(len(tokens)))
    prompt, answer = ids[:length], ids[length:]
    known = decoder.decode(prompt).rstrip("\ufffd")
    pieces = deltas(text_stream(decoder, prompt=tuple(prompt)), answer)
    assert known + "".join(pieces) == (text if answer else decoder.decode(prompt))
