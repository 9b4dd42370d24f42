"""What scores learn: the cost of skipping, from tokens that entered and from some that are explored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtfcli.models import routing_naive
from dtfcli.models.cost import cost_loss
from dtfcli.models.routing import select_explored
from tests.budget import examples
from tests.tiny import routed_model, tokens


def test_a_score_learns_what_skipping_costs() -> None:
    """On tokens that it has not seen, with the layers below routed; the offset makes scores costs."""
    model = routed_model("llama", score="update_size", explore=1.0).train()
    learning = [parameter for name, parameter in model.named_parameters() if "router" in name]
    optimizer = torch.optim.Adam(learning, lr=1e-2)
    for step in range(120):
        batch = tokens(16, 32, seed=step)
        model(batch, labels=batch).router_loss.backward()
        optimizer.step()
        model.zero_grad()
    records = model(tokens(32, 32, seed=999), output_routing=True).routing
    for record in records:
        counted = record.weight > 0
        score, cost = record.scores[counted], record.cost[counted]
        assert torch.corrcoef(torch.stack([score, cost]))[0, 1] > 0.2
        offset = model.model.routers[record.layer].cost_offset
        assert (score + offset - cost).mean().abs() < 0.5


@given(data=st.data())
@settings(max_examples=examples(30))
def test_the_loss_of_predicted_costs(data: st.DataObject) -> None:
    shape = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    scores, cost = (torch.randn(shape, generator=generator).requires_grad_() for _ in range(2))
    weight = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.7)
    known = weight > 0
    if not known.any():
        assert cost_loss(scores, cost, weight) == 0
        return
    ours = cost_loss(scores, cost, weight)
    theirs = routing_naive.cost_loss(list(scores[known]), list(cost[known]), weight[known].tolist())
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, scores)[0] for loss in (ours, theirs)))
    torch.testing.assert_close(cost_loss(scores + 7.0, cost, weight), ours, rtol=1e-4, atol=1e-5)


@given(data=st.data(), count=st.integers(1, 12))
@settings(max_examples=examples(60))
def test_explored_tokens_skip_and_are_drawn_without_bias(data: st.DataObject, count: int) -> None:
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    selected, real, sinks = (torch.rand(batch, length, generator=generator) < share for share in (0.4, 0.8, 0.1))
    noise = torch.rand(batch, length, generator=generator)
    explored, stands_for = select_explored(noise, selected, count, real, sinks)
    free = ~selected & real & ~sinks
    assert not (explored & ~free).any()
    assert explored.sum(1).tolist() == [min(count, int(n)) for n in free.sum(1)]
    for b in range(batch):
        if explored[b].any():
            assert float(stands_for[b]) * int(explored[b].sum()) == pytest.approx(int(free[b].sum()), abs=1e-4)
            assert noise[b][explored[b]].min() >= noise[b][free[b]].sort(descending=True).values[:count].min()
