"""Lossless conversion: at γ = 1 with the straight-through gate it is the dense model, and back is exact."""

import pytest
import torch

from dtfcli.models.conversion import convert, load_dense, to_dense
from tests.tiny import (
    ARCHITECTURES,
    CONTROLS,
    EVERY_ARCHITECTURE,
    FAMILIES,
    dense_model,
    pad,
    shared_routed_model,
    tokens,
)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", ["threshold", "topk"])
@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
@pytest.mark.parametrize("family", FAMILIES)
def test_capacity_one_is_the_dense_model(family: str, architecture: str, mode: str, tied: bool) -> None:
    dense = dense_model(family, tie_word_embeddings=tied)
    routed = convert(dense, architecture, capacity=1.0, gate="straight_through")
    routed.set_routing(mode)
    input_ids = tokens(3, 40)
    with torch.no_grad():
        difference = (routed(input_ids).logits - dense(input_ids).logits).abs().max()
    assert difference <= 1e-5


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
@pytest.mark.parametrize("family", FAMILIES)
def test_capacity_one_with_padding_agrees_on_real_tokens(family: str, architecture: str) -> None:
    dense = dense_model(family)
    routed = convert(dense, architecture, capacity=1.0)
    rows = [pad(tokens(1, 20, seed=s)[0], left, 10 - left) for s, left in enumerate((0, 4, 10))]
    input_ids, mask = (torch.stack(parts) for parts in zip(*rows, strict=True))
    with torch.no_grad():
        ours = routed(input_ids, attention_mask=mask).logits
        theirs = dense(input_ids, attention_mask=mask).logits
    assert (ours - theirs)[mask.bool()].abs().max() <= 1e-5


@pytest.mark.parametrize("capacity", [0.25, 1.0])
@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bit_identical(family: str, architecture: str, capacity: float) -> None:
    dense = dense_model(family)
    back = to_dense(convert(dense, architecture, capacity))
    assert type(back) is type(dense)
    assert back.state_dict().keys() == dense.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(back.state_dict().values(), dense.state_dict().values(), strict=True))
    input_ids = tokens(2, 30)
    assert torch.equal(back(input_ids).logits, dense(input_ids).logits)


def test_conversion_shares_tensors_and_leaves_the_dense_model_intact() -> None:
    dense = dense_model()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    shared, own = convert(dense), convert(dense, copy=True)
    name = "model.layers.1.mlp.up_proj.weight"
    pointer = dense.state_dict()[name].data_ptr()
    assert shared.state_dict()[name].data_ptr() == pointer
    assert own.state_dict()[name].data_ptr() != pointer
    with torch.no_grad():
        own.get_parameter(name).zero_()
    shared.requires_grad_(False)
    assert all(torch.equal(before[key], tensor) for key, tensor in dense.state_dict().items())
    assert all(parameter.requires_grad for parameter in dense.parameters())


@pytest.mark.slow
def test_real_model_from_gguf(smollm2_gguf: str) -> None:
    dense = load_dense(smollm2_gguf).eval()
    input_ids = torch.arange(400, 464).unsqueeze(0)
    with torch.no_grad():
        theirs = dense(input_ids).logits
        for architecture in (*ARCHITECTURES, *CONTROLS):
            routed = convert(dense, architecture, capacity=1.0, gate="straight_through")
            assert (routed(input_ids).logits - theirs).abs().max() <= 1e-5, architecture
            assert torch.equal(to_dense(routed)(input_ids).logits, theirs), architecture


@pytest.mark.parametrize("mode", ["threshold", "topk"])
@torch.no_grad()
def test_a_model_that_routes_everything_is_the_stock_one(mode: str) -> None:
    """Bit for bit: the routed layers multiply by the same library, row for row."""
    model, ids = shared_routed_model("qwen2", "dtf"), tokens(3, 20)
    with model.routing_mode(mode, 1.0):
        for kept in (0, 1):
            ours, stock = (m(ids, use_cache=False, logits_to_keep=kept) for m in (model, dense_model("qwen2")))
            assert torch.equal(ours.logits, stock.logits)
