"""`HeadwiseAttention` against `nn.MultiheadAttention`, which it stands in for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from secateur.allocate.plan import Plan
from secateur.graph.attention import HeadwiseAttention, headwise, see_heads
from secateur.graph.groups import find_groups
from secateur.surgery.certify import certify
from secateur.surgery.cut import apply
from secateur.surgery.simulate import mask


def pair(**kwargs: object) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(12, 3, **kwargs).double().eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randn_like(parameter))
    twin = copy.deepcopy(plain)
    see_heads(twin)
    assert isinstance(twin, HeadwiseAttention)
    return plain, twin


def tokens(n: int, width: int = 12, seed: int = 1) -> Tensor:
    return torch.randn(2, n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


CAUSAL = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
PADDING = torch.tensor([[False, False, False, True, True], [False] * 5])
ADDED = torch.randn(6, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masks", [{}, {"attn_mask": CAUSAL}, {"key_padding_mask": PADDING}, {"attn_mask": ADDED}])
@pytest.mark.parametrize("batch_first", [True, False])
def test_same_as_the_original(need_weights: bool, masks: dict[str, Tensor], batch_first: bool) -> None:
    plain, twin = pair(batch_first=batch_first)
    x = tokens(5) if batch_first else tokens(5).transpose(0, 1)
    for average in (True, False):
        kwargs = {"need_weights": need_weights, "average_attn_weights": average, **masks}
        for a, b in zip(plain(x, x, x, **kwargs), twin(x, x, x, **kwargs)):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_other_widths_for_key_and_value_and_no_bias_and_no_batch() -> None:
    plain, twin = pair(kdim=7, vdim=8, bias=False, batch_first=True)
    q, k, v = tokens(4), tokens(6, 7), tokens(6, 8, 2)
    torch.testing.assert_close(plain(q, k, v)[0], twin(q, k, v)[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain(q[0], k[0], v[0])[0], twin(q[0], k[0], v[0])[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain(q[0], k[0], v[0])[1], twin(q[0], k[0], v[0])[1], rtol=1e-12, atol=1e-12)


def test_only_what_can_stand_in_is_taken() -> None:
    assert headwise(nn.MultiheadAttention(4, 2))
    assert not headwise(nn.MultiheadAttention(4, 2, add_bias_kv=True))
    assert not headwise(nn.MultiheadAttention(4, 2, add_zero_attn=True))
    assert not headwise(nn.Linear(4, 2))


def test_heads_and_stream_of_an_encoder_can_be_cut() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = nn.Sequential(nn.Linear(5, 12), encoder, nn.Linear(12, 4))
    model, x = model.eval(), tokens(6, 5).float()
    groups = find_groups(model, x)
    assert sorted(group.size for group in groups.groups) == [3, 3, 12, 20, 20]
    plan = Plan(groups, tuple(tuple(range(1, group.size)) for group in groups.groups))
    smaller = apply(model, plan)
    certificate = certify(model, smaller, plan, x)
    assert certificate.ok, certificate.sentence
    attention = smaller[1].layers[0].self_attn
    assert isinstance(attention, nn.MultiheadAttention)
    assert attention.num_heads == 2
    assert attention.in_proj_weight.shape == (24, 11)
    assert type(model[1].layers[0].self_attn) is nn.MultiheadAttention
    with mask(model, plan, x):
        assert type(model[1].layers[0].self_attn) is HeadwiseAttention
    assert type(model[1].layers[0].self_attn) is nn.MultiheadAttention


def test_untouched_attention_keeps_its_class() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 10, batch_first=True).eval()
    x = tokens(3, 8).float()
    groups = find_groups(model, x)
    hidden = next(i for i, group in enumerate(groups.groups) if group.size == 10)
    keep = [tuple(range(group.size)) for group in groups.groups]
    keep[hidden] = (0, 1, 2)
    smaller = apply(model, Plan(groups, tuple(keep)))
    assert type(smaller.self_attn) is nn.MultiheadAttention
    assert smaller.linear1.out_features == 3
