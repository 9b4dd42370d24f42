"""What the tests of inspection share."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import routed_model, word_tokenizer

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


FIELDS: dict[str, dict[str, Any]] = {
    "forecast_error": {"score": "forecast_error", "bypass": "forecast", "kv_tokens": "all"},
    "surprise": {"score": "surprise"},
    "mod": {"architecture": "mod"},
}


def model_by(kind: str, **more: Any) -> Any:
    """A small routed model, calibrated; predicted costs have their layer's constant."""
    model: Any = routed_model(**FIELDS[kind] | more)
    for router in model.model.routers.values():
        if hasattr(router, "cost_offset"):
            router.cost_offset.fill_(-1.5)
    return model


@pytest.fixture(scope="session", params=list(FIELDS))
def model(request: pytest.FixtureRequest) -> Any:
    """A small routed model by each kind of score."""
    return model_by(request.param)


@pytest.fixture(scope="session")
def dtf_model() -> Any:
    """A small DTF of the recommended kind."""
    return model_by("forecast_error")
