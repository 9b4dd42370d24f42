"""The interactive prompt: context, commands, mistakes, and Ctrl-C."""

from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from dtfcli.cli.interactive import Chat, run
from dtfcli.errors import ConfigError
from dtfcli.generation import Sampling, generate
from tests.tiny import routed_model, word_tokenizer


@pytest.fixture(scope="module")
def chat_parts() -> tuple[Any, Any]:
    return routed_model(), word_tokenizer()


def typed(chat: Chat, text: str) -> None:
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text(text)
        run(chat)


def test_answers_keep_their_context(chat_parts: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = chat_parts
    chat = Chat(model, tokenizer, Sampling(max_new_tokens=4))
    typed(chat, "a b c\n/set max-new-tokens 2\n d\n/quit\n")
    first = generate(model, tokenizer, "a b c", Sampling(max_new_tokens=4)).text
    second = generate(model, tokenizer, f"a b c{first} d", Sampling(max_new_tokens=2)).text
    assert capsys.readouterr().out == f"{first}\n{second}\n"
    assert chat.context == f"a b c{first} d{second}"


def test_commands(chat_parts: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    chat = Chat(*chat_parts, Sampling(max_new_tokens=3))
    lines = ["/help", "/stats", "/routing", "a b", "/reset", "/nonsense", "/set temprature 1", "/set seed x"]
    typed(chat, "\n".join([*lines, "/set top_p 7", "/quit\n"]))
    err = capsys.readouterr().err
    for expected in ("/routing", "decode", "Forgotten", "not a command", "'temperature'", "number such as 0"):
        assert expected in err, expected
    assert "--top-p 7" in err
    assert chat.context == ""
    assert chat.sampling == Sampling(max_new_tokens=3)


def test_the_end_of_input_leaves(chat_parts: tuple[Any, Any]) -> None:
    typed(Chat(*chat_parts, Sampling()), "\x04")


def test_ctrl_c_stops_the_answer_alone(
    chat_parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, on_text: Any, **kwargs: Any) -> None:
        on_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr("dtfcli.generation.generate", interrupted)
    chat = Chat(*chat_parts, Sampling())
    typed(chat, "a b\n/quit\n")
    assert chat.context == "a bhalf"
    assert "half …" in capsys.readouterr().out


def test_a_dense_model_has_no_routing_to_color(chat_parts: tuple[Any, Any]) -> None:
    from dtfcli.models.conversion import to_dense

    model, tokenizer = chat_parts
    with pytest.raises(ConfigError, match="dense"):
        Chat(to_dense(model), tokenizer, Sampling()).command("/routing")
