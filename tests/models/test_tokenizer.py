"""Token ids and exact bytes, against the tokenizers library's own decoding, for each family of vocabularies."""

from typing import Any

import pytest
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from transformers import TokenizersBackend

from cadenza.models import LoadedModel, ModelError, Tokenizer
from cadenza.models.token_bytes import token_to_bytes

TEXTS = [
    "Hello, world",
    "naïve café ½",
    "漢字かな交じり文",
    "👩‍🚀🏽🦜",
    " two  spaces ",
    "a\tb\r\n\n",
    "١٢٣ ﷽",
    "▁",
]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def wrap(backend: Backend, **special: str) -> Tokenizer:
    return Tokenizer(TokenizersBackend(tokenizer_object=backend, **special))


def joined(tokenizer: Tokenizer, ids: list[int]) -> bytes:
    return b"".join(tokenizer.token_bytes(token_id) for token_id in ids)


def sentencepiece_bpe() -> Backend:
    """Llama 2's shape: ▁ for spaces through a normalizer, bytes for what the vocabulary lacks."""
    tokens = ["<unk>", "<s>", "</s>", *BYTE_TOKENS, "▁", "H", "e", "l", "o", "▁H", "ll"]
    backend = Backend(
        BPE(
            {token: place for place, token in enumerate(tokens)},
            [("▁", "H"), ("l", "l")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<s>", "</s>")])
    return backend


def sentencepiece_unigram() -> Backend:
    tokens = ["<unk>", *BYTE_TOKENS, "▁", "▁two", "▁spaces", "Hello", "字"]
    backend = Backend(Unigram([(token, -1.0) for token in tokens], unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    return backend


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_the_real_byte_level_tokenizer(smollm2: LoadedModel, text: str) -> None:
    ids = smollm2.tokenizer.encode(text)
    assert joined(smollm2.tokenizer, ids) == text.encode()
    assert smollm2.tokenizer.decode(ids) == text


def test_every_token_of_the_real_vocabulary_decodes_to_its_bytes(smollm2: LoadedModel) -> None:
    tokenizer = smollm2.tokenizer
    assert tokenizer.vocab_size == 49152
    for token_id in range(tokenizer.vocab_size):
        decoded = tokenizer.decode([token_id], skip_special_tokens=False)
        assert tokenizer.token_string(token_id) == decoded, token_id


@pytest.mark.parametrize("text", [text for text in TEXTS if text != "▁"])
def test_bytes_with_sentencepiece_and_byte_fallback(text: str) -> None:
    tokenizer = wrap(sentencepiece_bpe())
    assert joined(tokenizer, tokenizer.encode(text)) == f" {text}".encode()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["Hello two spaces", "字 and 漢", "🦜", "a  b"])
def test_bytes_with_metaspace(text: str) -> None:
    tokenizer = wrap(sentencepiece_unigram())
    assert joined(tokenizer, tokenizer.encode(text)) == text.encode()


def test_a_single_byte_token_is_that_byte() -> None:
    tokenizer = wrap(sentencepiece_bpe())
    assert tokenizer.token_bytes(3 + 0xE6) == b"\xe6"
    assert tokenizer.token_string(3 + 0xE6) == "\ufffd"
    assert tokenizer.token_bytes(1) == b"<s>"


def test_wordpiece_continuations_have_no_space() -> None:
    tokens = ["[UNK]", "play", "##ing", "cards"]
    backend = Backend(WordPiece({token: place for place, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = wrap(backend)
    assert joined(tokenizer, [1, 2, 3]).decode() == " " + tokenizer.decode([1, 2, 3]) == " playing cards"


def test_a_vocabulary_of_words_without_decoder() -> None:
    backend = Backend(WordLevel({"one": 0, "two": 1}, unk_token="one"))
    tokenizer = wrap(backend)
    assert joined(tokenizer, [0, 1]).decode() == " " + tokenizer.decode([0, 1])


def test_an_unknown_decoder_is_refused() -> None:
    with pytest.raises(ModelError, match="CTC"):
        token_to_bytes(decoders.CTC())


def test_ids_beyond_the_vocabulary_stand_for_nothing(smollm2: LoadedModel) -> None:
    for token_id in (-1, smollm2.tokenizer.vocab_size, 10**9):
        assert smollm2.tokenizer.token_bytes(token_id) == b""


def test_added_tokens_are_written_literally() -> None:
    backend = Backend(BPE({character: place for place, character in enumerate("abĠ")}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<think é>", normalized=False)])
    backend.add_special_tokens([AddedToken("<｜fin｜>", normalized=False)])
    tokenizer = wrap(backend)
    assert tokenizer.token_bytes(3) == "<think é>".encode()
    assert tokenizer.token_bytes(4) == "<｜fin｜>".encode()
    assert tokenizer.special_ids == {4}
    assert tokenizer.added_ids == {3, 4}
    assert tokenizer.vocab_size == 5


def test_special_tokens_are_added_skipped_and_parsed() -> None:
    from tokenizers.processors import TemplateProcessing

    backend = sentencepiece_bpe()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = wrap(backend, bos_token="<s>", eos_token="</s>")
    with_bos = tokenizer.encode("Hello")
    assert with_bos[0] == tokenizer.bos_token_id == 1
    assert tokenizer.encode("Hello", add_special_tokens=False) == with_bos[1:]
    assert tokenizer.encode("</s>", add_special_tokens=False)[-1] == tokenizer.eos_token_id == 2
    assert tokenizer.decode(with_bos) == "Hello"
    assert tokenizer.decode(with_bos, skip_special_tokens=False).startswith("<s>")


def test_a_truncation_saved_with_the_tokenizer_is_ignored() -> None:
    backend = sentencepiece_bpe()
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    assert len(wrap(backend).encode("Hello Hello Hello", add_special_tokens=False)) == 12


def test_encoding_equals_transformers(smollm2: LoadedModel) -> None:
    from transformers import AutoTokenizer

    reference: Any = AutoTokenizer.from_pretrained(str(smollm2.path))
    for text in TEXTS:
        assert smollm2.tokenizer.encode(text) == reference.encode(text)
        assert smollm2.tokenizer.decode(reference.encode(text)) == text
