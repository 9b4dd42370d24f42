"""Opening models, and what is said about wrong paths."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

import dtfcli
from dtfcli.conversion.convert import ConversionOptions
from dtfcli.conversion.estimate import estimate
from dtfcli.errors import CheckpointError, ConfigError, DTFError
from dtfcli.loading.build import build_tokenizer
from dtfcli.loading.source import open_source
from tests.tiny import SHAPE, dense_model, tokens, word_tokenizer
from tests.training.small_runs import small_settings


def test_load_a_routed_model(folder: Path) -> None:
    model = dtfcli.load_model(folder / "routed", device="cpu")
    assert not model.training
    assert (model.routing, model.capacity) == ("threshold", 0.25)
    model = dtfcli.load_model(str(folder / "routed"), routing="topk", capacity=0.5, device="cpu")
    assert (model.routing, model.capacity) == ("topk", 0.5)
    assert dtfcli.load_model(folder / "routed", routing="auto", device="cpu").routing == "threshold"
    with pytest.raises(ConfigError, match=r"routing = 'treshold'.*threshold, predictor, topk"):
        dtfcli.load_model(folder / "routed", routing="treshold", device="cpu")
    with pytest.raises(ConfigError, match=r"capacity = 1\.5"):
        dtfcli.load_model(folder / "routed", capacity=1.5, device="cpu")


def test_run_folder_stands_for_its_final_model(folder: Path) -> None:
    run = folder / "outputs" / "2026-01-01" / "mine"
    assert open_source(run).path == str(run / "final_model")
    assert dtfcli.load_model(run, device="cpu").config.capacity == 0.25


def test_dtype(folder: Path, tmp_path: Path) -> None:
    def dtypes(model: PreTrainedModel) -> set[torch.dtype]:
        return {parameter.dtype for name, parameter in model.named_parameters() if "router" not in name}

    assert dtypes(dtfcli.load_model(folder / "routed", device="cpu")) == {torch.float32}
    half = dtfcli.load_model(folder / "routed", device="cpu", dtype="bfloat16")
    assert dtypes(half) == {torch.bfloat16}
    assert half.model.layers[1].router.thresholds.dtype == torch.float32
    assert dtypes(dtfcli.load_model(folder / "dense", device="cpu", dtype=torch.float16)) == {torch.float16}
    dense_model().half().save_pretrained(tmp_path / "half")
    assert dtypes(dtfcli.load_model(tmp_path / "half", device="cpu")) == {torch.float32}
    with pytest.raises(ConfigError, match="dtype = 'int8'"):
        dtfcli.load_model(folder / "dense", dtype="int8")


def wrong_models(folder: Path, tmp_path: Path) -> dict[str, tuple[Path | str, str]]:
    """Name → a MODEL that is none, and what is said about it."""
    unfinished = tmp_path / "unfinished"
    checkpoint = unfinished / "checkpoints" / "step-000010"
    checkpoint.mkdir(parents=True)
    (unfinished / "settings.toml").write_text("")
    (checkpoint / "state.json").write_text("{}")
    (tmp_path / "no_weights").mkdir()
    shutil.copy(folder / "dense" / "config.json", tmp_path / "no_weights")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "notes.txt").write_text("")
    for name in ("lost_key", "huge"):
        shutil.copytree(folder / "routed", tmp_path / name)
    config = json.loads((tmp_path / "huge" / "config.json").read_text())
    (tmp_path / "huge" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    state = load_file(tmp_path / "lost_key" / "model.safetensors")
    del state["model.layers.1.router.beta_ce"]
    save_file(state, tmp_path / "lost_key" / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(folder / "dense", tmp_path / "lost_backbone")
    state = load_file(tmp_path / "lost_backbone" / "model.safetensors")
    state["extra"] = state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, tmp_path / "lost_backbone" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "unknown_type").mkdir()
    (tmp_path / "unknown_type" / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    shutil.copy(folder / "dense" / "model.safetensors", tmp_path / "unknown_type")
    return {
        "missing": (folder / "routde", f"no such file or folder. Did you mean '{folder}/routed'?"),
        "missing with a revision": (f"{folder}/nothing@main", "no such file or folder"),
        "nothing": ("", "no such file or folder"),
        "unfinished": (unfinished, f"dtf train --resume {unfinished}"),
        "checkpoint": (checkpoint, f"a training checkpoint; go on with it by `dtf train --resume {unfinished}`"),
        "weights file": (folder / "dense" / "model.safetensors", f"give its folder, {folder / 'dense'}"),
        "no weights": (tmp_path / "no_weights", "no weights"),
        "words": (tmp_path / "words", "not a model folder"),
        "day": (folder / "outputs" / "2026-01-01", "inside it are"),
        "lost router key": (tmp_path / "lost_key", "router.beta_ce"),
        "lost backbone key": (tmp_path / "lost_backbone", "missing: model.layers.1.mlp.up_proj.weight"),
        "huge": (tmp_path / "huge", "num_hidden_layers = 1000000000, but the weights are"),
        "unknown type": (tmp_path / "unknown_type", "nonsense"),
    }


def test_wrong_models_are_explained(folder: Path, tmp_path: Path) -> None:
    for name, (path, message) in wrong_models(folder, tmp_path).items():
        with pytest.raises(DTFError) as caught:
            dtfcli.load_model(path, device="cpu")
        text = str(caught.value)
        assert message in text, name
        assert str(path) in text, name
        assert len(text.splitlines()) <= 2, name
        assert caught.value.exit_code == 2, name


def test_hub_ids() -> None:
    source = open_source("Qwen/Qwen2.5-0.5B@abc")
    assert (source.kind, source.path, source.revision) == ("hub", "Qwen/Qwen2.5-0.5B", "abc")
    assert open_source("Qwen/Qwen2.5-0.5B", "v1").revision == "v1"
    with pytest.raises(CheckpointError, match="names another"):
        open_source("Qwen/Qwen2.5-0.5B@abc", "v1")


def test_load_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(small_settings(tmp_path))
    tokenizer.save_pretrained(tmp_path / "only_a_tokenizer")
    loaded = dtfcli.load_tokenizer(tmp_path / "only_a_tokenizer")
    text = "the cat sleeps\n  <|endoftext|> γ"
    assert loaded.decode(loaded(text, split_special_tokens=True)["input_ids"]) == text
    with pytest.raises(CheckpointError, match="no such file or folder"):
        dtfcli.load_tokenizer(tmp_path / "nowhere" / "else")


IMAGE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE |= {"image_size": 28, "patch_size": 14}
OPTIONS = ConversionOptions(save=0.01, loading={"device": "cpu", "dtype": "auto"})


@pytest.mark.parametrize(
    ("family", "fields", "stock"),
    [
        (
            "gemma3",
            {"text_config": SHAPE | {"head_dim": 8}, "vision_config": IMAGE, "mm_tokens_per_image": 4},
            "Gemma3",
        ),
        (
            "mistral3",
            {
                "text_config": SHAPE | {"model_type": "mistral", "head_dim": 8},
                "vision_config": IMAGE | {"model_type": "pixtral"},
            },
            "Mistral",
        ),
    ],
)
@torch.no_grad()
def test_of_a_model_that_sees_the_language_model_is_opened(
    tmp_path: Path, family: str, fields: dict[str, Any], stock: str
) -> None:
    """With the weights and the function of the whole; it converts as any other."""
    torch.manual_seed(0)
    whole: Any = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **fields)).eval()
    whole.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    model: Any = dtfcli.load_model(tmp_path)
    assert type(model).__name__ == f"{stock}ForCausalLM"
    ids = tokens(2, 12)
    assert torch.equal(model(ids).logits, whole(input_ids=ids).logits)
    assert dtfcli.route_mlps(model, save=0.01).config.routed_layer_indices == [3, 4]
    assert estimate(open_source(tmp_path), OPTIONS).parameters == model.num_parameters()


def test_the_outer_configuration_says_whether_embeddings_are_tied(tmp_path: Path) -> None:
    text = SHAPE | {"head_dim": 8, "tie_word_embeddings": False}
    config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=IMAGE, tie_word_embeddings=True)
    whole: Any = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    model: Any = dtfcli.load_model(tmp_path)
    assert type(model).__name__ == "Qwen3_5ForCausalLM"
    assert torch.equal(model.lm_head.weight, whole.get_input_embeddings().weight)


def test_a_model_of_sound_is_not_called_damaged(tmp_path: Path) -> None:
    AutoConfig.for_model("voxtral").save_pretrained(tmp_path)
    with pytest.raises(DTFError, match=r"Give a model of text"):
        estimate(open_source(tmp_path, weights=False), OPTIONS)


def test_a_language_model_that_has_no_class_is_named(tmp_path: Path) -> None:
    config = AutoConfig.for_model("qwen2_5_vl", vision_config={"depth": 1, "hidden_size": 32, "num_heads": 4})
    config.save_pretrained(tmp_path)
    with pytest.raises(DTFError, match=r"no language model of Qwen2_5_VLTextConfig alone\. Give a model of text"):
        estimate(open_source(tmp_path, weights=False), OPTIONS)


def test_an_attention_kernel_that_a_model_does_not_have_is_named(tmp_path: Path) -> None:
    config = AutoConfig.for_model("bloom", hidden_size=32, n_layer=2, n_head=4, vocab_size=97)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(DTFError, match=r"Name another with --attn-implementation\.$"):
        dtfcli.load_model(tmp_path, attn_implementation="sdpa")
    assert dtfcli.load_model(tmp_path, attn_implementation="eager").num_parameters() > 0
