"""Lossless conversion beyond `test_contract`: a real model, tied embeddings, losses, whose tensors they are."""

import pytest
import torch

from dtfcli.models.conversion import convert, load_dense, to_dense
from tests.cases import every_family
from tests.tiny import ARCHITECTURES, dense_model, shared_routed_model, tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tied_embeddings_stay_tied(architecture: str) -> None:
    dense = dense_model(tie_word_embeddings=True)
    routed = convert(dense, architecture, capacity=1.0)
    routed.set_routing("topk")
    assert routed.lm_head.weight is routed.model.embed_tokens.weight
    with torch.no_grad():
        assert (routed(tokens(3, 40)).logits - dense(tokens(3, 40)).logits).abs().max() <= 1e-5


@every_family
def test_losses_are_the_stock_ones(family: str) -> None:
    """Granite divides its logits, Gemma scales its embeddings: at γ = 1 the loss is the stock model's."""
    ids, dense = tokens(2, 12), dense_model(family)
    model = convert(dense, "mod", 1.0)
    with torch.no_grad():
        expected = dense(ids, labels=ids).loss
        assert torch.allclose(model(ids, labels=ids).lm_loss, expected, rtol=1e-5)
        assert torch.allclose(model.train()(ids, labels=ids).lm_loss, expected, rtol=1e-5)


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
        for architecture in ARCHITECTURES:
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
