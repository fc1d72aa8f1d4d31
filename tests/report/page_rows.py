"""Rows of every task a page knows, small and made up."""

import re

DENSE = "dense"
RIVALS = (("exact top_k=64", 0.55, 0.02), ("mixed top_k=64 rank=16 int8", 0.1, 0.04))
# As policies are typed: no space where a line could break.
LONG = ("loki:fraction=0.125,rank=16,plane_dtype=int8,basis=balanced-of-another-text", 0.2, 0.03)
WORSE = ("streaming top_k=64", 0.12, 0.3)


def bounded(name, value, width):
    """A metric with its interval."""
    return {name: value, f"{name}_low": value - width, f"{name}_high": value + width}


def row(task, contender="mixed top_k=64 rank=16 int8", *, settings=None, n=20, model="tiny", **m):
    dense = contender == DENSE
    words = dict(re.findall(r"(\w+)=(\w+)", contender))
    select = {"method": "dense" if dense else "loki"}
    if "rank" in words:
        select["rank"] = int(words["rank"])
    return {
        "task": task,
        "protocol": f"how {task.partition(':')[0]} is measured",
        "model": {"id": model, "hash": "0123456789abcdef"},
        "contender": contender,
        "policy": {
            "select": select,
            "budget": {} if dense else {"top_k": int(words.get("top_k", 64))},
        },
        "basis": None if dense else {"kind": contender.split()[0], "tokens": 99},
        "settings": settings or {"corpus": "novel"},
        "metrics": m,
        "n": n,
        "provenance": {
            "time": "2026-01-02T03:04:05Z",
            "commit": "abc123",
            "versions": {"torch": "2.99"},
            "python": "3.11",
            "machine": "x86_64",
            "processor": "Some CPU",
            "threads": 1,
            "command": "loki-attn eval sweep tiny.yaml",
        },
    }


def perplexity(contender, share, kl, **options):
    metrics = {**bounded("perplexity", 20 + kl, 0.5), **bounded("kl_to_dense", kl, kl / 5)}
    metrics |= bounded("top1_agreement", 0.9, 0.02)
    return row("perplexity", contender, read_bytes_share=share, **metrics, **options)


def fidelity(kind, rank, top_k=64):
    metrics = {**bounded("recall", rank / 64, 0.02), **bounded("mass", rank / 40, 0.01)}
    return row("fidelity", f"{kind} rank={rank} top_k={top_k}", **metrics)


def spectrum(side, layers=4, heads=2, head_dim=8):
    cumulative = [min(1.0, (at + 1) / (head_dim - 1)) for at in range(head_dim)]
    return row(
        "spectrum",
        "pca",
        settings={"side": side},
        n=layers * heads,
        head_dim=head_dim,
        index=list(range(layers)),
        rank_at_90=[[2 + layer + head for head in range(heads)] for layer in range(layers)],
        cumulative=[cumulative] * layers,
    )


def needle(contender, share, length, kind="uuid"):
    hits = [5, 3 if share < 1 else 5, 5]
    cells = [{"depth": d, "score": k / 5, "n": 5} for d, k in zip((0, 0.5, 1), hits, strict=True)]
    score = sum(hits) / 15
    settings = {"kind": kind, "length_tokens": length}
    metrics = {"by_depth": cells, "read_bytes_share": share, **bounded("score", score, 0.05)}
    return row("needle", contender, settings=settings, n=15, **metrics)


def ruler(contender, share, subtask, score):
    settings = {"subtask": subtask, "length_tokens": 4096}
    metrics = {**bounded("score", score, 0.1), **bounded("score_delta", score - 0.9, 0.1)}
    return row("ruler", contender, settings=settings, read_bytes_share=share, **metrics)


def step(contender, kind, context, median_us, **more):
    """A flat row of the bench."""
    return {
        "task": "bench decode",
        "contender": contender,
        "shape": "small",
        "kind": kind,
        "batch": 1,
        "dtype": "bf16",
        "threads": 2,
        "context": context,
        "median_us": median_us,
        "p20_us": 0.9 * median_us,
        "p80_us": 1.2 * median_us,
        "samples": 30,
        "part": None,
        "gate": {"verdict": "passed"},
        "provenance": row("x")["provenance"],
        **more,
    }


def everything():
    """At least one row of everything that has a figure, and of a task nobody knows."""
    everyone = ((DENSE, 1.0, 0.0), *RIVALS, WORSE)
    rows = [perplexity(name, share, kl) for name, share, kl in (*RIVALS, WORSE)]
    rows += [fidelity(kind, rank) for kind in ("pca", "mixed") for rank in (8, 16, 32)]
    rows += [spectrum("post"), spectrum("pre")]
    rows += [needle(name, share, n) for name, share, _ in everyone for n in (4096, 8192)]
    rows += [
        ruler(name, share, task, score - kl)
        for name, share, kl in (*everyone, LONG)
        for task, score in (("niah_single_1", 0.9), ("vt", 0.8))
    ]
    for context in (1024, 4096):
        rows.append(step("sdpa-hf", "torch", context, context / 2))
        rows.append(step("loki int8 k=64", "loki", context, context / 10, k=64, plane="int8"))
        rows.append(step("loki int8 k=64: score", "loki", context, 5.0, k=64, part="score"))
    rows.append(row("weather", **bounded("sunshine", 0.25, 0.1), clouds=3.0))
    return rows


FIGURES = (
    "Quality against bytes read",
    "Needles against bytes read",
    "RULER against bytes read",
    "Needles: uuid",
    "RULER",
    "Recall of exact top-k against rank",
    "Captured mass against rank",
    "Rank of the keys",
    "Spectra of the keys",
    "Speed of a decode step: small",
)
