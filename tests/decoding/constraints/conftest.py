"""The real model's vocabulary, and compilers with worker processes."""

from collections.abc import Iterator

import pytest

from cadenza.decoding.constraints.compiler import ConstraintCompiler
from cadenza.decoding.constraints.constraint import TokenTables
from cadenza.decoding.constraints.limits import Limits
from cadenza.decoding.constraints.vocabulary import Vocabulary
from cadenza.models import LoadedModel

from .compiling import VOCABULARY, Make


@pytest.fixture(scope="session")
def real_tables(smollm2: LoadedModel) -> TokenTables:
    tokenizer = smollm2.tokenizer
    vocabulary = Vocabulary.from_tokenizer(tokenizer, smollm2.eos_token_ids, tokenizer.vocab_size)
    return TokenTables(vocabulary, tokenizer.encode_bytes)


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes compilers that are closed in the end."""
    made: list[ConstraintCompiler] = []

    def new(limits: Limits | None = None) -> ConstraintCompiler:
        made.append(ConstraintCompiler(lambda: (VOCABULARY, VOCABULARY), VOCABULARY.segment, limits))
        return made[-1]

    yield new
    for compiler in made:
        compiler.close()
