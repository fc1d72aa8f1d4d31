"""The attention function by itself, where no tiny model asks for what it can do."""

import pytest
import torch
from tiny_models import build
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import loki_attn
from loki_attn.errors import CacheError, UnsupportedModelError
from loki_attn.integrations.transformers.function import loki_attention


class Module(nn.Module):
    """An attention module without a state: of a model that is not attached."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def tensors(q_len=4, seq=6):
    draw = torch.Generator().manual_seed(0)
    sizes = ((1, 4, q_len, 8), (1, 4, seq, 8), (1, 4, seq, 8))
    return [torch.randn(size, generator=draw) for size in sizes]


@pytest.mark.parametrize(
    ("module", "asked"),
    [(Module(is_causal=False), {}), (Module(is_causal=True), {"is_causal": False})],
)
def test_bidirectional_attention_sees_everything(module, asked):
    query, key, value = tensors()
    out, _ = loki_attention(module, query, key, value, None, **asked)
    expected = scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(out.transpose(1, 2), expected)


@pytest.mark.parametrize(
    ("module", "asked"),
    [(Module(), {}), (Module(is_causal=False), {"is_causal": True})],
)
def test_causal_attention_is_aligned_to_the_end(module, asked):
    query, key, value = tensors()
    out, _ = loki_attention(module, query, key, value, None, **asked)
    mask = torch.ones(4, 6, dtype=torch.bool).tril(2)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(out.transpose(1, 2), expected)


@pytest.mark.parametrize("additive", [False, True])
def test_queries_that_see_nothing_give_zero(additive):
    query, key, value = tensors()
    mask = torch.ones(1, 1, 4, 6, dtype=torch.bool)
    mask[:, :, 1] = False
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    out, _ = loki_attention(Module(), query, key, value, mask)
    assert (out[:, 1] == 0).all()
    assert out.isfinite().all()


@pytest.mark.parametrize("name", ["indices", "block_indices", "position_bias", "cache", "salt"])
def test_what_is_not_understood_is_refused(name):
    with pytest.raises(UnsupportedModelError, match=f"passes '{name}' to its attention"):
        loki_attention(Module(), *tensors(), None, **{name: object()})


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_layer_lets_go_of_its_cache(error):
    """Whatever stops a layer before its cache was updated, nobody else may update it then."""
    model = build("Llama")
    ids = torch.tensor([[5, 6, 7]])

    def fail(*_):
        raise error

    with loki_attn.attach(model, "exact-topk") as attachment:
        cache = attachment.cache()
        hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(fail)
        with pytest.raises(error):
            model(input_ids=ids, past_key_values=cache)
        hook.remove()
    assert not any(layer.armed for layer in cache.layers)
    with pytest.raises(CacheError):
        model(input_ids=ids, past_key_values=cache)
    assert cache.get_seq_length() == 0
