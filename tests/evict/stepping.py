"""A layer walked through a prompt and steps, and the same by the slowest code there is."""

import math

import torch

from loki_attn.testing import DrivenLayer


def pieces(rows, start, stop):
    """Tokens start..stop of query, key and value."""
    return [part[:, :, start:stop] for part in rows]


def visible_of(valid, start, stop):
    """What tokens start..stop see of the tokens before them, bool [batch, 1, tokens, seen]."""
    if valid is None:
        return None
    causal = torch.ones(stop - start, stop).tril(start).bool()
    return causal[None, None] & valid[:, None, None, :stop]


def walk(policy, shape, rows, prompt, *, valid=None, chunks=(), how="dense", **more):
    """Run a prompt and single-token steps; return the layer, what it held, what it answered."""
    layer = DrivenLayer(policy, shape, **more)
    bounds = [*chunks, *range(prompt, rows[1].shape[2] + 1)]
    held, outs, start = [], [], 0
    for stop in bounds:
        part = pieces(rows, start, stop)
        outs.append(
            layer.attend(
                *part, visible_of(valid, start, stop), how=how if stop - start == 1 else "dense"
            )
        )
        held.append(layer.positions())
        start = stop
    return layer, held, torch.cat(outs, 2)


def shares(query, keys, scaling, bias=None, temperature=1.0):
    """Soft-max weights [group, rows] of one query per head of a group, in float64."""
    logits = query.double() @ keys.double().T * scaling
    if bias is not None:
        logits = logits + bias
    return (logits / temperature).softmax(-1)


def simulate(rows, prompt, judge):
    """What every head holds after the prompt and after every step, by a loop over tokens.

    `judge(batch, head)` gives an object with `see(token, held, query, keys)`, called once per query
    with the positions that it sees, and `drop(held, judging)`, called at the end of a forward.
    """
    query, key, _ = rows
    batch, kv_heads, tokens, _ = key.shape
    group = query.shape[1] // kv_heads
    found = []
    for b in range(batch):
        for h in range(kv_heads):
            one, held, history = judge(b, h), [], []
            for t in range(tokens):
                held = [*held, t]
                asked = query[b, h * group : (h + 1) * group, t]
                one.see(t, held, asked, key[b, h])
                if t >= prompt - 1:
                    held = one.drop(held, t)
                    history.append(held)
            found.append(history)
    steps = len(found[0])
    return [
        [[found[b * kv_heads + h][s] for h in range(kv_heads)] for b in range(batch)]
        for s in range(steps)
    ]


def best_of(scores, held, count):
    """The `count` positions with the highest scores, the lower of equals, in order."""
    order = sorted(held, key=lambda p: (-scores[p], p))
    return sorted(order[: max(0, count)])


def scaling_of(shape):
    return 1 / math.sqrt(shape.head_dim)
