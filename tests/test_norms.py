"""BatchNorm statistics taken anew: over all samples, and only where something was read."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur.posttraining import reestimate


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=5), plane=st.sampled_from([0, 1, 2]))
def test_statistics_are_those_of_all_samples_at_once(sizes: list[int], plane: int) -> None:
    torch.manual_seed(sum(sizes))
    kind = nn.BatchNorm2d if plane else nn.BatchNorm1d
    found, expected = kind(3), kind(3, momentum=None)
    batches = [5 + 3 * torch.randn(n, 3, *[plane] * 2 if plane else ()) for n in sizes]
    reestimate(found, batches)
    expected.train()(torch.cat(batches))
    torch.testing.assert_close(found.running_mean, expected.running_mean)
    torch.testing.assert_close(found.running_var, expected.running_var)


class Branches(nn.Module):
    """A norm that runs, by keyword, and one of an auxiliary head that only training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.auxiliary = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
        self.auxiliary.running_mean.fill_(7)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(input=self.auxiliary(x) if self.training else x)  # type: ignore[no-any-return]


def test_a_leftover_sample_counts_as_one_and_norms_that_do_not_run_stay() -> None:
    model = Branches().train()
    samples = torch.arange(33.0)[:, None].expand(33, 2)
    reestimate(model, samples.split(32))
    assert model.training
    assert model.norm.training
    torch.testing.assert_close(model.norm.running_mean, torch.full((2,), 16.0))
    torch.testing.assert_close(model.norm.running_var, samples.var(0))
    assert torch.equal(model.auxiliary.running_mean, torch.full((2,), 7.0))
