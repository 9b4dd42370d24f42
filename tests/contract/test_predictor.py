"""`predictor` routing: trained on the top-K mask without pulling at the model; the rest is in `test_contract`."""

import pytest
import torch

from dtfcli.models.conversion import convert
from tests.tiny import TOKENWISE, dense_model, shared_routed_model, tokens


@pytest.mark.parametrize("architecture", TOKENWISE)
def test_learns_the_mask_and_leaves_the_model_alone(architecture: str) -> None:
    model = convert(dense_model(), architecture, predictor_loss_weight=0.01).train()
    input_ids = tokens(8, 32)
    plain = convert(dense_model(), architecture).train()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "predictor" not in k})
    for each in (model, plain):
        each(input_ids, labels=input_ids).loss.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, msg=name)

    own = [p for name, p in model.named_parameters() if "predictor" in name]
    optimizer = torch.optim.Adam(own, lr=3e-3)

    def right() -> float:
        with torch.no_grad():
            records = model(input_ids, output_routing=True).routing
        return sum(float(((r.predictor_logits > 0) == r.selected).float().mean()) for r in records) / len(records)

    before = right()
    for _ in range(120):
        optimizer.zero_grad()
        out = model(input_ids, labels=input_ids)
        out.router_loss.backward()
        optimizer.step()
    assert right() > max(0.8, before)
    torch.testing.assert_close(out.loss, out.lm_loss + out.router_loss + 0.05 * (out.prior_loss or 0.0))


@torch.no_grad()
def test_its_own_rule() -> None:
    model = shared_routed_model("llama", "mod", predictor_loss_weight=0.01)
    with model.routing_mode("predictor"):
        for record in model(tokens(4, 30), output_routing=True).routing:
            routed = record.predictor_logits > 0
            routed[:, 0] = True  # the sink
            assert torch.equal(record.selected, routed)
            assert record.scores is record.predictor_logits


def test_a_model_without_one_says_so() -> None:
    model = shared_routed_model("llama", "dtf")
    with pytest.raises(ValueError, match="predictor_loss_weight above 0"):
        model.set_routing("predictor")
    with pytest.raises(ValueError, match="predictor_loss_weight above 0"):
        convert(dense_model(), routing="predictor")
    with pytest.raises(ValueError, match="predictor_loss_weight"):
        convert(dense_model(), predictor_loss_weight=-1)
