"""Building and loading models, and what is said about wrong ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM

import dtfcli
from dtfcli.cost.accounting import describe, forward_flops_per_token
from dtfcli.errors import CheckpointError, ConfigError, DTFError
from dtfcli.loading.build import build_model, build_tokenizer
from dtfcli.loading.paths import resolve_model_path
from dtfcli.models.stack import is_added
from dtfcli.settings import Settings, load_settings
from dtfcli.settings.presets import preset_names
from tests.tiny import FAMILIES, dense_model, routed_model, tokens
from tests.training.small_runs import small_settings

ARCHITECTURES = ("dtf", "mod", "dense")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model folder, a routed one, and a run folder around it."""
    root = tmp_path_factory.mktemp("models")
    dense_model().save_pretrained(root / "dense")
    routed_model(capacity=0.25).save_pretrained(root / "routed")
    run = root / "outputs" / "2026-01-01" / "mine"
    run.mkdir(parents=True)
    (run / "settings.toml").write_text("")
    shutil.copytree(root / "routed", run / "final_model")
    return root


def with_base(folder: Path, base: Path, architecture: str = "dtf", **model: object) -> Settings:
    """Settings that start from `base`."""
    values = small_settings(folder, architecture).model_dump(exclude_none=True)
    del values["model"]["scratch"]
    values["model"] |= {"base": str(base), **model}
    return Settings.model_validate(values)


# Building


@pytest.mark.parametrize("family", FAMILIES)
def test_all_architectures_share_the_backbone_of_a_seed(tmp_path: Path, family: str) -> None:
    models = {
        name: build_model(small_settings(tmp_path, name, model={"scratch": {"family": family}}))
        for name in ARCHITECTURES
    }
    backbone = models["dense"].state_dict()
    assert type(models["dense"]) is {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}[family]
    for name in ("dtf", "mod"):
        state = models[name].state_dict()
        assert {key for key in state if not is_added(key)} == set(backbone)
        assert all(torch.equal(state[key], backbone[key]) for key in backbone)
        assert models[name].dtype == torch.float32


def test_seeds(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    one, again, other = (build_model(small_settings(tmp_path, run={"seed": seed})).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    # By their bits: thresholds are NaN until they are calibrated.
    assert all(torch.equal(one[name].nan_to_num(), again[name].nan_to_num()) for name in one)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.prior.w_in.weight"):
        assert not torch.equal(one[name], other[name])


def test_scratch_model_fits_its_tokenizer(tmp_path: Path) -> None:
    settings = small_settings(tmp_path)
    tokenizer = build_tokenizer(settings)
    model = build_model(settings, tokenizer=tokenizer)
    assert model.config.vocab_size == len(tokenizer) <= settings.model.scratch.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.get_input_embeddings().padding_idx is None
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_settings_reach_the_model(tmp_path: Path) -> None:
    settings = small_settings(
        tmp_path,
        model={
            "capacity": 0.25,
            "dense_edges": 0,
            "routed_layers": [1],
            "sink_tokens": 2,
            "attn_implementation": "eager",
        },
    )
    config = build_model(settings).config
    assert (config.capacity, config.routed_layer_indices, config.sink_tokens) == (0.25, [1], 2)
    assert config._attn_implementation == "eager"
    assert config.rope_parameters["rope_theta"] == settings.model.scratch.rope_theta


def test_base_folder_is_converted(folder: Path, tmp_path: Path) -> None:
    dense = load_file(folder / "dense" / "model.safetensors")
    for architecture in ARCHITECTURES:
        state = build_model(with_base(tmp_path, folder / "dense", architecture)).state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in dense.items())


def test_routed_base_goes_on_as_it_is(folder: Path, tmp_path: Path) -> None:
    base = folder / "outputs" / "2026-01-01" / "mine"
    model = build_model(with_base(tmp_path, base))
    saved = load_file(base / "final_model" / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in saved.items())
    with pytest.raises(ConfigError, match=r"is a dtf model: train it with model=dtf"):
        build_model(with_base(tmp_path, base, "mod"))
    with pytest.raises(ConfigError, match=r"model\.capacity = 0\.5.*has 0\.25"):
        build_model(with_base(tmp_path, base, capacity=0.5))


def test_fields_that_do_not_fit_the_base(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"routed_layers.*0 to 5"):
        build_model(with_base(tmp_path, folder / "dense", routed_layers=[1, 9]))


def test_tokenizer_larger_than_the_vocabulary(folder: Path, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(small_settings(tmp_path))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    values = with_base(tmp_path, folder / "dense").model_dump(exclude_none=True)
    values["data"]["tokenizer"] = str(tmp_path / "tokenizer")
    settings = Settings.model_validate(values)
    with pytest.raises(ConfigError, match=r"data\.tokenizer = .* tokens, the model's vocabulary 97"):
        build_model(settings, tokenizer=build_tokenizer(settings))


# The account


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_builds_on_the_meta_device(preset: str) -> None:
    settings = load_settings(preset)
    model = build_model(settings, meta=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    account = describe(model, seq_len=settings.data.seq_len, micro_batch_size=1, dtype="bfloat16", checkpointing=False)
    assert account.trainable_parameters == account.parameters > 1e6
    assert (account.new_parameters == 0) == (settings.model.architecture == "dense")
    assert account.share_of_dense == 1.0 if settings.model.architecture == "dense" else account.share_of_dense < 1.0


def test_parameters_of_known_models() -> None:
    sizes = {"dense-qwen2.5-0.5b": 494_032_768, "dtf-smollm2-135m": 134_515_008}
    for preset, size in sizes.items():
        account = describe(
            build_model(load_settings(preset), meta=True),
            seq_len=1024,
            micro_batch_size=1,
            dtype="float32",
            checkpointing=True,
        )
        assert account.parameters - account.new_parameters == size


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("architecture", "capacity"), [("dense", 1.0), ("dtf", 0.5), ("dtf", 0.125), ("mod", 0.5)])
def test_flops_agree_with_torchs_counter(family: str, architecture: str, capacity: float) -> None:
    """To 1 %: matrix products are counted by both alike, the formula leaves out nothing else."""
    model = dense_model(family) if architecture == "dense" else routed_model(family, architecture, capacity)
    model.set_attn_implementation("eager")
    if architecture != "dense":
        model.set_routing("topk")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens(1, 64), use_cache=False)
    assert forward_flops_per_token(model, 64) * 64 == pytest.approx(counter.get_total_flops(), rel=0.01)


# Loading


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
    assert resolve_model_path(run).path == str(run / "final_model")
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


def test_options_for_a_dense_model(folder: Path) -> None:
    for option in ({"routing": "topk"}, {"capacity": 0.5}):
        with pytest.raises(ConfigError, match="dense model, which routes nothing"):
            dtfcli.load_model(folder / "dense", device="cpu", **option)
    assert isinstance(dtfcli.load_model(folder / "dense", routing="auto", device="cpu"), LlamaForCausalLM)


def test_devices(folder: Path) -> None:
    with pytest.raises(ConfigError, match="device = 'gpu'"):
        dtfcli.load_model(folder / "dense", device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device = 'cuda:7'"):
            dtfcli.load_model(folder / "dense", device="cuda:7")


def wrong_models(folder: Path, tmp_path: Path) -> dict[str, tuple[Path | str, str]]:
    """Name → a MODEL that is none, and what is said about it."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "settings.toml").write_text("")
    checkpoint = tmp_path / "unfinished" / "checkpoints" / "step-000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    (tmp_path / "photo.png").write_text("")
    (tmp_path / "fake.gguf").write_text("no")
    (tmp_path / "no_weights").mkdir()
    shutil.copy(folder / "dense" / "config.json", tmp_path / "no_weights")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "notes.txt").write_text("")
    for name in ("broken_config", "cut", "lost_key"):
        shutil.copytree(folder / "routed", tmp_path / name)
    (tmp_path / "broken_config" / "config.json").write_text("{")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    state = load_file(tmp_path / "lost_key" / "model.safetensors")
    del state["model.layers.1.router.beta_ce"]
    save_file(state, tmp_path / "lost_key" / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(folder / "dense", tmp_path / "lost_backbone")
    state = load_file(tmp_path / "lost_backbone" / "model.safetensors")
    state["extra"] = state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, tmp_path / "lost_backbone" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "unknown_type").mkdir()
    (tmp_path / "unknown_type" / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    (tmp_path / "unknown_type" / "model.safetensors").write_bytes(b"")
    return {
        "missing": (folder / "routde", f"no such file or folder. Did you mean '{folder}/routed'?"),
        "missing with a revision": (f"{folder}/nothing@main", "no such file or folder"),
        "nothing": ("", "no such file or folder"),
        "empty": (tmp_path / "empty", "an empty folder"),
        "adapter": (tmp_path / "adapter", "a LoRA adapter"),
        "unfinished": (tmp_path / "unfinished", f"dtf train --resume {tmp_path / 'unfinished'}"),
        "checkpoint": (
            checkpoint,
            f"a training checkpoint; go on with it by `dtf train --resume {tmp_path / 'unfinished'}`",
        ),
        "png": (tmp_path / "photo.png", "a file, but not a model"),
        "gguf": (tmp_path / "fake.gguf", "not a GGUF file"),
        "weights file": (folder / "dense" / "model.safetensors", f"give its folder, {folder / 'dense'}"),
        "no weights": (tmp_path / "no_weights", "no weights"),
        "words": (tmp_path / "words", "not a model folder"),
        "day": (folder / "outputs" / "2026-01-01", "inside it are"),
        "broken config": (tmp_path / "broken_config", "cannot be loaded"),
        "cut weights": (tmp_path / "cut", "cannot be loaded"),
        "lost router key": (tmp_path / "lost_key", "router.beta_ce"),
        "lost backbone key": (tmp_path / "lost_backbone", "missing: model.layers.1.mlp.up_proj.weight"),
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


def test_revision_is_for_the_hub(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="revision = 'main' is for models on the Hub"):
        dtfcli.load_model(folder / "dense", revision="main")


def test_hub_ids() -> None:
    found = resolve_model_path("Qwen/Qwen2.5-0.5B@abc")
    assert (found.kind, found.path, found.revision) == ("hub", "Qwen/Qwen2.5-0.5B", "abc")
    assert resolve_model_path("Qwen/Qwen2.5-0.5B", "v1").revision == "v1"
    with pytest.raises(CheckpointError, match="names another"):
        resolve_model_path("Qwen/Qwen2.5-0.5B@abc", "v1")


def test_load_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(small_settings(tmp_path))
    tokenizer.save_pretrained(tmp_path / "only_a_tokenizer")
    loaded = dtfcli.load_tokenizer(tmp_path / "only_a_tokenizer")
    text = "the cat sleeps\n  <|endoftext|> γ"
    assert loaded.decode(loaded(text, split_special_tokens=True)["input_ids"]) == text
    with pytest.raises(CheckpointError, match="no such file or folder"):
        dtfcli.load_tokenizer(tmp_path / "nowhere" / "else")
