"""The tokenizer that a GGUF file describes, written out as tokenizer.json and its configuration.

A byte-level vocabulary is rebuilt here, entry by entry; a sentencepiece one is transformers' work. Which token
is BOS, EOS and so on comes from the file in both cases. Knows nothing of weights.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cadenza.models.errors import ModelError
from cadenza.models.gguf_header import GGUFHeader

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

logger = logging.getLogger(__name__)

CONTROL, USER_DEFINED = 3, 4
"""llama.cpp's token types: special tokens, and tokens matched whole that are text all the same."""
SPECIAL_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
END_IDS = ("eos", "eot", "eom")

# A GGUF file holds no regular expression, only llama.cpp's name of one (`tokenizer.ggml.pre`). Cut otherwise
# than when the merges were learned, numbers and contractions become tokens that the model has not seen there.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHER = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = rf"{_WORDS}|\p{{N}}{{1,3}}|{_OTHER}"
QWEN2_SPLIT = rf"{_WORDS}|\p{{N}}|{_OTHER}"
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe"), LLAMA3_SPLIT),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), QWEN2_SPLIT),
    "tekken": TEKKEN_SPLIT,
}
WHOLE_WORDS_FIRST = frozenset(name for name, split in SPLITS.items() if split != QWEN2_SPLIT)
"""Vocabularies in which a word that is a token as it stands needs no merges."""
GPT2_LIKE = ("gpt-2", "mpt", "olmo", "phi-2", "jais", "trillion")
DIGIT_BY_DIGIT = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


def write_tokenizer(gguf: Path, header: GGUFHeader, folder: Path) -> None:
    from transformers import TokenizersBackend

    facts = header.metadata
    tokens = facts["tokenizer.ggml.tokens"]
    special = {
        f"{name}_token": tokens[facts[key]]
        for name, word in SPECIAL_IDS.items()
        if (key := f"tokenizer.ggml.{word}_token_id") in facts
    }
    template = facts.get("tokenizer.chat_template")
    if facts.get("tokenizer.ggml.model") == "gpt2":
        backend = byte_level_backend(facts)
        tokenizer = TokenizersBackend(tokenizer_object=backend, chat_template=template, **special)
    else:
        # Not AutoTokenizer: it would read the whole file once more, only to choose a class.
        tokenizer = TokenizersBackend.from_pretrained(str(folder), gguf_file=str(gguf.absolute()))
        for name, token in special.items():
            setattr(tokenizer, name, token)
        # A file that does not say so wants BOS if its vocabulary is Llama's, as llama.cpp has it.
        default = {"tokenizer.ggml.add_bos_token": facts.get("tokenizer.ggml.model") == "llama"}
        add_ends(tokenizer.backend_tokenizer, default | facts)
    tokenizer.save_pretrained(folder)


def end_ids(header: GGUFHeader) -> list[int]:
    """The tokens that end a text or a turn."""
    keys = (f"tokenizer.ggml.{name}_token_id" for name in END_IDS)
    return list(dict.fromkeys(int(header.metadata[key]) for key in keys if key in header.metadata))


def byte_level_backend(facts: dict[str, Any]) -> "Backend":
    """A `tokenizers.Tokenizer` of the vocabulary in a GGUF file's metadata."""
    from tokenizers import AddedToken, Tokenizer, decoders
    from tokenizers.models import BPE

    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    types: list[int] = facts.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ModelError("its vocabulary holds the same token twice")
    merges = [tuple(merge.split(" ", 1)) for merge in facts["tokenizer.ggml.merges"]]
    splitting = facts.get("tokenizer.ggml.pre")
    backend = Tokenizer(BPE(vocabulary, merges, ignore_merges=splitting in WHOLE_WORDS_FIRST))
    backend.pre_tokenizer = _pre_tokenizer(splitting)
    backend.decoder = decoders.ByteLevel()
    for kind, is_special in ((CONTROL, True), (USER_DEFINED, False)):
        chosen = [token for token, token_type in zip(tokens, types, strict=True) if token_type == kind]
        added = [AddedToken(token, normalized=False, special=is_special) for token in chosen]
        (backend.add_special_tokens if is_special else backend.add_tokens)(added)
    add_ends(backend, facts)
    return backend


def _pre_tokenizer(name: str | None) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if name in SPLITS:
        split = pre_tokenizers.Split(Regex(SPLITS[name]), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, byte_level])
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in DIGIT_BY_DIGIT:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if name not in GPT2_LIKE:
        logger.warning("This GGUF file cuts text as %r, which is not known here; GPT-2's way is used", name)
    return gpt2


def add_ends(backend: "Backend", facts: dict[str, Any]) -> None:
    """Have BOS and EOS put around a text where the file asks for that."""
    from tokenizers.processors import TemplateProcessing

    ends = {}
    for word in ("bos", "eos"):
        token_id = facts.get(f"tokenizer.ggml.{word}_token_id")
        if facts.get(f"tokenizer.ggml.add_{word}_token") and token_id is not None:
            ends[word] = (facts["tokenizer.ggml.tokens"][token_id], token_id)
    if not ends:
        return
    before = [f"{ends['bos'][0]}:0"] if "bos" in ends else []
    after = [f"{ends['eos'][0]}:0"] if "eos" in ends else []
    backend.post_processor = TemplateProcessing(
        single=[*before, "$A:0", *after],
        pair=[*before, "$A:0", *after, "$B:1"],
        special_tokens=list(ends.values()),
    )
