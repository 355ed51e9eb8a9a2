"""How a byte-level vocabulary of a GGUF file cuts text before merging, by llama.cpp's name for it.

A GGUF file holds no regular expression, only a name (`tokenizer.ggml.pre`). Cut differently from how the
merges were learned, numbers and contractions become other tokens than the model was trained on. transformers
knows some of the names, or none of them in its older versions, and takes GPT-2's splitting for the rest.
Knows nothing of files.
"""

import logging
from typing import Any

logger = logging.getLogger(__name__)

GPT2_LIKE = ("default", "gpt-2", "mpt", "olmo", "phi-2", "jais", "trillion")
DIGIT_BY_DIGIT = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
LLAMA3_LIKE = ("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe")
QWEN2_LIKE = ("qwen2", "deepseek-r1-qwen", "stablelm2")
KNOWN_TO_TRANSFORMERS = ("tekken", "gpt-4o", "llama4", "qwen35", "minimax-m2")

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHER = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = rf"{_WORDS}|\p{{N}}{{1,3}}|{_OTHER}"
QWEN2_SPLIT = rf"{_WORDS}|\p{{N}}|{_OTHER}"


def apply_splitting(backend: Any, name: str | None) -> None:
    """Give the `tokenizers.Tokenizer` of a byte-level vocabulary the splitting of this name."""
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if name in DIGIT_BY_DIGIT:
        gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    elif name in LLAMA3_LIKE:
        split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        backend.model.ignore_merges = True  # words that are tokens as they stand need no merges
    elif name in QWEN2_LIKE:
        split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    elif name is not None and name not in GPT2_LIKE + KNOWN_TO_TRANSFORMERS:
        logger.warning(
            "The pre-tokenizer %r of this GGUF file is not known here; text may be cut as GPT-2 cuts it", name
        )
