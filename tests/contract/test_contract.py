"""The contract of every way of choosing on every backbone: one test a promise, on a CPU and where there is one on CUDA.

On a GPU the same weights on the CPU say what is right.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dtfcli.models.conversion import convert, to_dense
from dtfcli.models.mlp_fitting import fit_routing
from dtfcli.models.routing import topk_capacity
from tests.budget import examples
from tests.cases import (
    EVERY_WAY,
    Batch,
    Case,
    batches,
    blocks_everywhere,
    every_case,
    every_way,
    everywhere,
    in_chunks,
    together,
)
from tests.contract.naive_model import NaiveModel
from tests.near import near_tie
from tests.tiny import BACKBONES, VOCABULARY, dense_model, tokens

CAPACITIES = (0.125, 0.25, 0.5, 0.75, 1.0)


@everywhere
@torch.no_grad()
def test_capacity_one_is_the_dense_model_and_back(case: Case, device: torch.device) -> None:
    """With padding, too; in either mode. The way back is exact."""
    dense: Any = dense_model(case.family).to(device)
    routed = convert(dense, capacity=1.0, **case.fields | {"gate": "straight_through", "routing": "threshold"})
    assert {tensor.device.type for tensor in routed.state_dict().values()} == {device.type}
    batch = together([tokens(1, 20, seed=s) for s in range(3)], [0, 4, 10], [])
    ids, mask, near = batch.input_ids.to(device), batch.mask.to(device), 1e-5 if device.type == "cpu" else 1e-4
    for mode in case.modes:
        with routed.routing_mode(mode):
            assert (routed(ids).logits - dense(ids).logits).abs().max() <= near
            ours, stock = (model(ids, attention_mask=mask).logits for model in (routed, dense))
            assert (ours - stock)[mask.bool()].abs().max() <= near
    back = to_dense(routed)
    assert type(back) is type(dense)
    assert back.state_dict().keys() == dense.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), dense.state_dict().values(), strict=True))
    assert torch.equal(back(ids).logits, dense(ids).logits)


@everywhere
@given(batch=batches(), capacity=st.sampled_from(CAPACITIES), syncs=st.booleans())
@settings(max_examples=examples(8))
@torch.no_grad()
def test_cached_and_chunked_is_together_is_alone(
    case: Case, device: torch.device, batch: Batch, capacity: float, syncs: bool
) -> None:
    """Any split, padding and neighbors; whether layers synchronize with the device or not."""
    model, its = case.on(device), case.on()
    ids, mask = batch.input_ids.to(device), batch.mask.to(device)
    with (
        pytest.MonkeyPatch.context() as patch,
        model.routing_mode(case.mode, capacity),
        its.routing_mode(case.mode, capacity),
    ):
        patch.setattr(model.model, "syncs", syncs, raising=False)  # stacks of routed MLPs have none
        uncached = model(ids, attention_mask=mask, use_cache=False).logits.cpu()
        cached = in_chunks(model, ids, mask, batch.cuts)[0].cpu()
        for b, row in enumerate(batch.rows):
            if near_tie(its, row):
                continue
            alone = its(row, use_cache=False).logits[0]
            assert (uncached[b][batch.real(b)] - alone).abs().max() <= 1e-4
            assert (cached[b][batch.real(b)] - alone).abs().max() <= 1e-4
            assert (in_chunks(model, row.to(device), None, batch.cuts)[0][0].cpu() - alone).abs().max() <= 1e-4


@blocks_everywhere
@given(batch=batches())
@settings(max_examples=examples(8))
@torch.no_grad()
def test_topk_takes_k_tokens_of_each_row_whatever_its_neighbors(case: Case, device: torch.device, batch: Batch) -> None:
    model, its = case.on(device), case.on()
    with model.routing_mode("topk"), its.routing_mode("topk"):
        out = model(batch.input_ids.to(device), attention_mask=batch.mask.to(device), output_routing=True)
        for b, row in enumerate(batch.rows):
            real = batch.real(b)
            for record in out.routing if case.chooses_tokens else ():
                assert int(record.selected[b].sum()) == topk_capacity(0.5, row.shape[1])
            assert all(not record.selected[b].cpu()[~real].any() for record in out.routing)
            if near_tie(its, row):
                continue
            alone = its(row, output_routing=True)
            assert (out.logits[b].cpu()[real] - alone.logits[0]).abs().max() <= 1e-4
            for ours, theirs in zip(out.routing, alone.routing, strict=True):
                assert torch.equal(ours.selected[b].cpu()[real], theirs.selected[0])


@everywhere
@given(data=st.data(), length=st.integers(2, 60), capacity=st.sampled_from(CAPACITIES))
@settings(max_examples=examples(6))
@torch.no_grad()
def test_no_look_at_the_future(
    case: Case, device: torch.device, data: st.DataObject, length: int, capacity: float
) -> None:
    """Cases × examples × 10 rows, each changed from a place of its own: some 3,000."""
    model, ids = case.on(device), tokens(10, length, data.draw(st.integers(0, 2**20)))
    changed = torch.tensor(data.draw(st.lists(st.integers(1, length - 1), min_size=10, max_size=10)))
    later = torch.arange(length) >= changed.unsqueeze(1)
    other = torch.where(later, (ids + data.draw(st.integers(1, VOCABULARY - 1))) % VOCABULARY, ids)
    with model.routing_mode(case.mode, capacity):
        difference = (model(ids.to(device)).logits - model(other.to(device)).logits).abs().amax(-1).cpu()
        if device.type == "cuda":  # other shapes, other sums: scores at a threshold may flip
            difference[[near_tie(model, row.to(device)) for row in ids.split(1)]] = 0.0
    assert difference[~later].max() <= (1e-5 if device.type == "cpu" else 1e-4)


@everywhere
@torch.no_grad()
def test_saved_and_reloaded(case: Case, device: torch.device, tmp_path: Path) -> None:
    """From the device, to the device and to the CPU."""
    model, its, ids = case.on(device), case.on(), tokens(3, 33)
    model.save_pretrained(tmp_path)
    for place in {device, torch.device("cpu")}:
        again = type(model).from_pretrained(tmp_path, device_map={"": str(place)})
        assert again.device.type == place.type
        assert again.routing == case.mode
        assert again.state_dict().keys() == model.state_dict().keys()
        compared = [b for b, row in enumerate(ids.split(1)) if not near_tie(its, row)]
        assert compared
        assert (again(ids.to(place)).logits.cpu() - its(ids).logits)[compared].abs().max() <= 1e-4


READER = """
import json, sys, torch
sys.modules["dtfcli"] = None  # importing it fails
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    with torch.no_grad():
        torch.save(model(torch.load(folder / "ids.pt", weights_only=True)).logits, folder / "logits.pt")
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
generator = pipeline("text-generation", model=folder, tokenizer=tokenizer, trust_remote_code=True)
print(json.dumps(generator("a b c", max_new_tokens=4, do_sample=False)[0]["generated_text"]))
def with_manager():
    with model.continuous_batching_context_manager():
        pass
for start in (model.init_continuous_batching, with_manager, lambda: model.generate_batch([[1, 2]], max_new_tokens=2)):
    try:
        start()
    except ValueError as error:
        print(error)
"""


def test_reloaded_where_dtfcli_is_not_installed(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast) -> None:
    """All backbones in one process: the same logits bit for bit; a text, and what is refused, with a remedy."""
    ids, folders = tokens(3, 33), tmp_path / "models"
    routed_mlps = {f"0-{family}": convert(dense_model(family), routed_part="mlp") for family in ("llama", "qwen2")}
    for name, model in routed_mlps.items():
        fit_routing(model, [{"input_ids": ids}])
        model.save_pretrained(folders / name)
        torch.save(ids, folders / name / "ids.pt")
    cases = [next(case for case in EVERY_WAY if case.family == family) for family in BACKBONES]
    for place, case in enumerate(cases):
        case.on().save_pretrained(folders / f"{place:02}")
        torch.save(ids, folders / f"{place:02}" / "ids.pt")
        word_tokenizer.save_pretrained(folders / f"{place:02}")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", READER, str(folders)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for place, case in enumerate(cases):
        theirs = torch.load(folders / f"{place:02}" / "logits.pt", weights_only=True)
        with torch.no_grad():  # at the same places in memory, where the same kernels run
            ours = type(case.on()).from_pretrained(folders / f"{place:02}")(ids).logits
        assert torch.equal(theirs, ours), case
    for name, model in routed_mlps.items():
        theirs = torch.load(folders / name / "logits.pt", weights_only=True)
        with torch.no_grad():
            assert torch.equal(theirs, type(model).from_pretrained(folders / name)(ids).logits), name
    prompt = word_tokenizer("a b c", return_tensors="pt")
    expected = cases[-1].on().generate(**prompt, max_new_tokens=4, do_sample=False)[0, 3:]
    text, *refused = result.stdout.splitlines()[-4:]
    assert json.loads(text) == "a b c" + word_tokenizer.decode(expected)
    for line in refused:
        assert "paged cache holds every token in every layer" in line
        assert "dtf generate --prompts FILE --batch-size N" in line


@every_case
@torch.no_grad()
def test_decoding_is_what_the_naive_model_says(case: Case) -> None:
    model, agreed = case.on(), 0
    for seed, capacity in enumerate((0.25, 0.5, 0.75)):
        row = tokens(1, 20, seed)
        with model.routing_mode(case.mode, capacity):
            if not near_tie(model, row):
                naive = NaiveModel(model, case.mode, capacity).logits(row)
                assert (in_chunks(model, row, None, [7, *range(8, 20)])[0][0] - naive).abs().max() <= 1e-4
                agreed += 1
    assert agreed >= 2


@every_case
def test_training_is_what_the_naive_model_says(case: Case) -> None:
    """The loss, with all that routing learns from, and every parameter's gradient; rows padded on either side."""
    model = case.fresh(**{"explore": 1.0} if case.learns_updates else {}).train()
    batch = together([tokens(1, length, length) for length in (17, 9, 12)], [0, 8, 3], [])
    targets = (batch.mask.cumsum(1) > 1) & batch.mask.bool()
    parameters = list(model.parameters())
    loss = model(batch.input_ids, attention_mask=batch.mask, labels=batch.input_ids.masked_fill(~targets, -100)).loss
    ours = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    naive = NaiveModel(model, "topk").loss(batch.rows)
    theirs = torch.autograd.grad(naive, parameters, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(loss, naive, rtol=1e-4, atol=1e-5)
    apart = {
        name: (a - b).abs().max().item()
        for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True)
        if not torch.allclose(a, b, rtol=1e-3, atol=1e-4)
    }
    assert not apart


@every_way
@pytest.mark.parametrize("explore", [0.0, 0.5])
def test_every_parameter_learns(case: Case, explore: float) -> None:
    model = case.fresh(**{"explore": explore} if case.learns_updates else {}).train()
    ids = tokens(2, 32)
    out = model(ids, labels=ids)
    out.loss.backward()
    kept = {layer for layer, share in model.config.layer_capacities().items() if share}
    for name, parameter in model.named_parameters():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        if layer not in set(model.routed_layers) - kept or "forecast" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@every_way
@torch.no_grad()
def test_a_calibrated_threshold_routes_the_share_on_other_text(case: Case) -> None:
    """512 rows of random tokens: γ ± 0.02 over all layers, ± 0.03 in each; between the grid's points, too."""
    model, capacities = case.fresh(), (0.125, 0.25, 0.5, 0.75, 0.6)
    if not case.chooses_tokens:  # it keeps layers: two of three at γ = 0.5, and every token enters them
        records = model(tokens(4, 30), output_routing=True).routing
        assert [float(record.selected.float().mean()) for record in records] == [1.0, 0.0, 1.0]
        return
    model.calibrate([{"input_ids": tokens(64, 64, seed=s)} for s in range(4)], (*capacities[:-1], 0.625))
    other = [tokens(128, 64, seed=100 + s) for s in range(4)]
    for capacity in capacities:
        if case.mode == "predictor" and capacity == 0.5:  # its own rule, σ(p) > 0.5
            continue
        with model.routing_mode(case.mode, capacity):
            runs = [model(rows, output_routing=True).routing for rows in other]
        shares = torch.tensor([[record.selected.float().mean() for record in run] for run in runs]).mean(0)
        assert (shares.mean() - capacity).abs() <= 0.02, (capacity, shares)
        assert (shares - capacity).abs().max() <= 0.03, (capacity, shares)
