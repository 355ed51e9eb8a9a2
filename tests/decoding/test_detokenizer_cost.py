"""The work for a token does not grow with the answer, whatever the answer is made of."""

import pytest

from cadenza.decoding.detokenizer import IncrementalDetokenizer

TOKENS = {
    "text": b"word ",
    "nothing, as skipped special tokens are": b"",
    "bytes that are no character": b"\xff",
}


class CountingDecoder:
    def __init__(self, token: bytes) -> None:
        self._token = token
        self.longest = 0

    def decode(self, ids: object, *, skip_special_tokens: bool = True) -> str:
        assert isinstance(ids, list)
        self.longest = max(self.longest, len(ids))
        return (self._token * len(ids)).decode(errors="replace")


@pytest.mark.parametrize("name", TOKENS)
def test_a_bounded_number_of_tokens_is_decoded_again(name: str):
    decoder = CountingDecoder(TOKENS[name])
    detokenizer = IncrementalDetokenizer(decoder, (), True)
    text = "".join(detokenizer.push(0) for _ in range(300)) + detokenizer.flush()
    assert text == (TOKENS[name] * 300).decode(errors="replace")
    assert decoder.longest <= 64
