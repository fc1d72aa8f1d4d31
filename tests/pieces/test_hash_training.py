"""Hash training: labels and loss by the book, the same result every time, heads on their own."""

import numpy as np
import pytest
import torch

from loki_attn.errors import InputError
from loki_attn.pieces.hash_training import hash_loss, pair_labels
from loki_attn.select.hata import Hata
from loki_attn.testing import layer_shape, random_rows

SHAPE = layer_shape(4, 2, 16)
SMALL = {"bits": 32, "steps": 20}


def window(seed=0, shape=SHAPE, batch=1):
    query, key, _ = random_rows(shape, 96, batch=batch, q_len=96, decay=1.0, seed=seed)
    return query, key


def trained(*windows, layer=0, **settings):
    learner = Hata.calibrator(**{**SMALL, **settings})
    for query, key in windows:
        learner.observe(layer, query, key)
    return learner.finish()[layer]


def test_labels_fall_from_20_to_1_over_the_best_tenth():
    key = torch.arange(50.0)[None, :, None]  # later keys score higher
    labels = pair_labels(torch.ones(1, 2, 1), key, torch.tensor([39, 49]))
    assert labels[0, 0, 36:40].tolist() == pytest.approx([1, 22 / 3, 41 / 3, 20])
    assert labels[0, 0, :36].tolist() == [-1.0] * 36
    assert labels[0, 0, 40:].tolist() == [0.0] * 10
    assert labels[0, 1, 45:].tolist() == pytest.approx([1, 5.75, 10.5, 15.25, 20])


@pytest.mark.parametrize("last", [0, 3])
def test_a_query_that_sees_few_keys_has_one_best(last):
    labels = pair_labels(
        torch.ones(1, 1, 1), torch.arange(9.0)[None, :, None], torch.tensor([last])
    )
    assert labels[0, 0].tolist() == [-1.0] * last + [20.0] + [0.0] * (8 - last)


def test_the_loss_is_its_definition():
    query, key = (rows.double() for rows in random_rows(SHAPE, 12)[:2])
    query, key = query[0].view(2, 2, 16), key[0]
    weight = torch.randn(2, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = pair_labels(query, key, torch.tensor([11, 7])).double()
    found = hash_loss(weight, query, key, labels, similarity=0.2, balance=2.0, decorrelation=1.0)
    for head in range(2):
        w = weight[head].numpy()
        # 2 sigmoid(x / 10) - 1, as it is printed
        asked, held = (2 / (1 + np.exp(-0.1 * (r[head].numpy() @ w))) - 1 for r in (query, key))
        pairs = [
            (float(labels[head, i, j]), np.sum((asked[i] - held[j]) ** 2))
            for i, last in enumerate((11, 7))
            for j in range(last + 1)
        ]
        similar = sum(label * apart for label, apart in pairs) / len(pairs)
        balanced = np.sum(((asked.mean(0) + held.mean(0)) / 32) ** 2)
        alike = np.linalg.norm(w.T @ w - np.eye(32))
        assert float(found[head]) == pytest.approx(0.2 * similar + 2 * balanced + alike)


def test_it_repeats_and_follows_its_seed():
    one, same, other = (trained(window(), seed=seed)["hash"] for seed in (4, 4, 5))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_neither_global_randomness_nor_other_layers_matter():
    alone = trained(window())
    torch.manual_seed(99)
    state = torch.get_rng_state()
    learner = Hata.calibrator(**SMALL)
    for layer in (7, 0, 3):
        learner.observe(layer, *window(seed=layer))
    found = learner.finish()
    assert list(found) == [0, 3, 7]
    for name in ("hash", "hash_mean"):
        assert torch.equal(found[0][name], alone[name])
    assert torch.equal(torch.get_rng_state(), state)


def test_two_calibrators_share_nothing():
    first = Hata.calibrator(**SMALL)
    first.observe(0, *window(seed=1))
    second = trained(window(seed=2))
    assert torch.equal(second["hash"], trained(window(seed=2))["hash"])
    assert torch.equal(first.finish()[0]["hash"], trained(window(seed=1))["hash"])


def test_kv_heads_are_trained_on_their_own():
    query, key = window()
    both = trained((query, key))
    second = trained((query[:, 2:], key[:, 1:]))
    for name in ("hash", "hash_mean"):
        torch.testing.assert_close(both[name][1:], second[name], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(both["hash"][0], both["hash"][1])


def test_a_batch_is_so_many_windows():
    query, key = window(batch=3)
    apart = [(query[i : i + 1], key[i : i + 1]) for i in range(3)]
    at_once, one_by_one = trained((query, key)), trained(*apart)
    for name in ("hash", "hash_mean"):
        torch.testing.assert_close(at_once[name], one_by_one[name], rtol=1e-4, atol=1e-5)


def test_the_mean_is_that_of_all_keys_or_nought():
    windows = [window(seed=1), window(seed=2)]
    keys = torch.cat([key for _, key in windows], 2)[0]
    torch.testing.assert_close(trained(*windows)["hash_mean"], keys.mean(1))
    assert not trained(*windows, centre=False)["hash_mean"].any()


def test_decorrelation_alone_leads_to_a_tight_frame():
    """Rows of W of equal length and at right angles: each coordinate counts alike."""
    alone = {"similarity": 0.0, "balance": 0.0, "steps": 200}
    weight = trained(window(), **alone)["hash"]
    stretch = torch.linalg.svdvals(weight)
    assert float((stretch - 1).abs().max()) < 0.05


def test_windows_of_forwards_without_gradients_can_be_learnt_from():
    expected = trained(window())["hash"]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            query, key = (rows.clone() for rows in window())
            learner = Hata.calibrator(**SMALL)
            learner.observe(0, query, key)
            assert torch.equal(learner.finish()[0]["hash"], expected)


def test_rows_of_half_precision_and_short_windows_are_learnt_from():
    query, key = (rows.to(torch.bfloat16) for rows in window())
    found = trained((query[:, :, :1], key[:, :, :1]), (query, key))
    assert found["hash"].dtype == torch.float32
    assert found["hash"].shape == (2, 16, 32)
    assert bool(torch.isfinite(found["hash"]).all())


def test_nothing_observed_is_refused():
    with pytest.raises(InputError, match="Nothing was observed; show at least one window"):
        Hata.calibrator().finish()


def test_settings_are_recorded_whole():
    assert Hata.calibrator(bits=64).settings == {
        "bits": 64,
        "centre": True,
        "steps": 300,
        "seed": 0,
        "similarity": 0.2,
        "balance": 2.0,
        "decorrelation": 1.0,
    }
