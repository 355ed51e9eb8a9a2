"""The vocabulary of the real model."""

import pytest

from cadenza.decoding.constraints.constraint import TokenTables
from cadenza.decoding.constraints.vocabulary import Vocabulary
from cadenza.models import LoadedModel


@pytest.fixture(scope="session")
def real_tables(smollm2: LoadedModel) -> TokenTables:
    tokenizer = smollm2.tokenizer
    vocabulary = Vocabulary.from_tokenizer(tokenizer, smollm2.eos_token_ids, tokenizer.vocab_size)
    return TokenTables(vocabulary, tokenizer.encode_bytes)
