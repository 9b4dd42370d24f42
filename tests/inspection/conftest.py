"""What the tests of inspection share."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import VOCABULARY, routed_model, word_tokenizer

TEXT = "a b c d a b w30 w31 a a b c w50 w51 w52 e f g h a b c d e f g h i j k l m n o p"


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    """A tokenizer that drops the space between words."""
    return word_tokenizer()


@pytest.fixture(scope="session")
def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that spreads most characters beyond ASCII over several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, the other cat did not " * 3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="session")
def metaspace() -> PreTrainedTokenizerFast:
    """A tokenizer with SentencePiece's marks: a word begins with ▁."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat, the Other cat did not 1 2 3. " * 3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(scope="session", params=["dtf", "mod"])
def model(request: pytest.FixtureRequest) -> Any:
    """A small routed model of either architecture."""
    assert VOCABULARY == 97
    return routed_model(architecture=request.param)


@pytest.fixture(scope="session")
def dtf_model() -> Any:
    """A small DTF."""
    return routed_model()
