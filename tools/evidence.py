"""Run the experiments behind docs/results on one model, section by section, as rows.

    python tools/evidence.py ordering --model smollm2-135m --stats STATS --corpora CORPORA \
        --out docs/results/smollm2-135m.jsonl

STATS holds key statistics `<model>-<corpus>.safetensors` (`loki-attn calibrate --stats-out`),
CORPORA the text files of tools/fetch_corpora.py. Text beyond the first million characters is
evaluated, so that it does not overlap with the calibration text at the beginning.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from pca_attn import pca_attn

from loki_attn import Basis, KeyStats, fit, models, preset
from loki_attn.evaluate.fidelity import fidelity
from loki_attn.evaluate.perplexity import perplexity
from loki_attn.evaluate.protocol import Contender
from loki_attn.evaluate.results import Row, append_rows, make_row
from loki_attn.integrations.transformers import TransformersLM

_SKIP_CHARACTERS: Final = 1_000_000


class Evidence:
    """One model, its statistics, its texts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        model, tokenizer = models.load(options.model, dtype=torch.bfloat16)
        self.lm = TransformersLM(model, tokenizer)
        self._bases: dict[str, Basis] = {}

    def stats(self, corpus: str) -> KeyStats:
        """The key statistics of this model on a corpus."""
        path = Path(self.options.stats) / f"{self.options.model}-{corpus}.safetensors"
        return KeyStats.load(path)[0]

    def basis(self, spec: str) -> Basis:
        """Fit by a short name: kind, then options after colons, e.g. "mixed:columns=3"."""
        if spec not in self._bases:
            kind, *options = spec.split(":")
            words = dict(option.split("=") for option in options)
            stats = self.stats(words.get("corpus", self.options.calibrated_on))
            arguments: dict[str, object] = {"provenance": {"corpus": words.get("corpus", "brown")}}
            if "side" in words:
                arguments["side"] = words["side"]
            if "columns" in words:
                arguments["pca_columns"] = int(words["columns"])
            if "sharp" in words:
                arguments["sharpness"] = float(words["sharp"])
            if kind == "uncentred":
                kind, arguments["centred"] = "pca", False
            control, _, kind = kind.rpartition("-")
            fitted = fit(stats, kind, **arguments)  # type: ignore[arg-type]
            self._bases[spec] = _CONTROLS[control](fitted)
        return self._bases[spec]

    def ids(self, tokens: int, windows: int) -> list[int]:
        """Windows from the corpora in turn."""
        found: list[int] = []
        for index in range(windows):
            names = self.options.texts.split(",")
            text = (Path(self.options.corpora) / f"{names[index % len(names)]}.txt").read_text()
            start = min(_SKIP_CHARACTERS, len(text) // 2) + 50_000 * (index // len(names))
            found += self.lm.encode(text[start : start + 8 * tokens])[:tokens]
        return found


def _first_head_for_all(basis: Basis) -> Basis:
    """What results when keys are dumped after their repetition and the first rows are taken."""
    layers = {i: layer.heads([0] * basis.num_kv_heads) for i, layer in basis.layers.items()}
    return replace(basis, layers=layers)


_CONTROLS: Final[dict[str, Callable[[Basis], Basis]]] = {
    "": lambda basis: basis,
    "shuffled": lambda basis: basis.shuffle_heads(),
    "repeated": _first_head_for_all,
}


def loki(evidence: Evidence, spec: str, name: str = "", **overrides: object) -> Contender:
    """Loki with a basis, ranking at full precision unless told otherwise."""
    overrides = {"plane_dtype": "fp32", **overrides}
    shown = " ".join(f"{k}={v}" for k, v in overrides.items() if k in {"rank", "top_k", "fraction"})
    policy = preset("loki", **overrides)
    return Contender(name=name or f"{spec} {shown}", policy=policy, basis=evidence.basis(spec))


def exact(name: str = "", **overrides: object) -> Contender:
    """The upper bound of every ranking."""
    shown = " ".join(f"{k}={v}" for k, v in overrides.items() if k in {"top_k", "fraction"})
    return Contender(name=name or f"exact {shown}", policy=preset("exact-topk", **overrides))


def streaming(**overrides: object) -> Contender:
    """Sinks and recents only."""
    shown = " ".join(f"{k}={v}" for k, v in overrides.items() if k in {"top_k", "fraction"})
    return Contender(name=f"streaming {shown}", policy=preset("streaming-llm", **overrides))


def ranks(evidence: Evidence) -> Iterator[Row]:
    """Rank at 90 % variance, and how much variance a basis of one corpus keeps on another."""
    corpora = evidence.options.rank_corpora.split(",")
    everything = {corpus: evidence.stats(corpus) for corpus in corpora}
    for corpus, stats in everything.items():
        metrics: dict[str, object] = {}
        for side in ("post", "pre"):
            for centred in (True, False):
                fitted = fit(stats, "pca", side=side, centred=centred)  # type: ignore[arg-type]
                table = fitted.rank_at(0.9).double()
                label = f"rank90_{side}{'' if centred else '_uncentred'}"
                metrics[label] = float(table.mean())
                metrics[f"{label}_layers"] = table.mean(1).tolist()
            basis = fit(stats, "pca", side=side)  # type: ignore[arg-type]
            for other, theirs in everything.items():
                metrics[f"variance_quarter_{side}_on_{other}"] = _kept(basis, theirs, side)
        name = Contender(name=f"pca on {corpus}", policy=preset("dense"), basis=basis)
        yield make_row(
            evidence.lm,
            name,
            task="ranks",
            protocol="smallest rank whose share of the key variance reaches 90 %, mean over layers "
            "and KV heads; share of the centred variance in the first head_dim/4 coordinates",
            settings={"corpus": corpus, "tokens": stats.tokens},
            metrics=metrics,
            n=len(stats.layers),
        )


def _kept(basis: Basis, stats: KeyStats, side: str) -> float:
    shares = []
    for layer in basis.layer_indices:
        covariance = stats.covariance(layer, side=side)  # type: ignore[arg-type]
        lead = basis.layer(layer).key_map[..., : basis.head_dim // 4].double()
        kept = torch.einsum("hdr,hde,her->h", lead, covariance, lead)
        shares.append(kept / covariance.diagonal(dim1=-2, dim2=-1).sum(-1))
    return float(torch.stack(shares).mean())


def ordering(evidence: Evidence) -> Iterator[Row]:
    """The paper's tables: every query selects, alone in its head, nothing forced."""
    dim = evidence.lm.head_dim
    plain: dict[str, object] = {
        "group_reduce": "none",
        "sinks": 0,
        "recents": 0,
        "min_k": 16,
    }
    fractions = (0.5, 0.25, 0.125)
    contenders = [exact(fraction=fraction, **plain) for fraction in fractions]
    contenders += [
        loki(evidence, spec, fraction=fraction, rank=int(dim * share), **plain)
        for fraction in fractions
        for share in fractions
        for spec in evidence.options.ordering_bases.split(",")
    ]
    quarter: dict[str, object] = {"fraction": 0.25, "rank": dim // 4, **plain}
    controls = [
        "random",
        "shuffled-pca",
        "shuffled-balanced",
        "pca:corpus=pydocs",
        "balanced:corpus=pydocs",
        "mixed",
    ]
    contenders += [loki(evidence, spec, **quarter) for spec in controls]
    contenders += [
        Contender(name=f"pca-attn rank={r}", policy=pca_attn(r), basis=evidence.basis("pca"))
        for r in (dim // 2, dim // 4)
    ]
    yield from _perplexity(evidence, contenders)


def centring(evidence: Evidence) -> Iterator[Row]:
    """Why centring hurts: with and without forced sinks and recents."""
    quarter = {
        "fraction": 0.25,
        "rank": evidence.lm.head_dim // 4,
        "group_reduce": "none",
        "min_k": 16,
    }
    contenders = [
        loki(evidence, spec, f"{spec} sinks={s} recents={r}", sinks=s, recents=r, **quarter)
        for spec in (
            "pca",
            "uncentred",
            "pca:side=pre",
            "repeated-pca",
            "shuffled-pca",
            "random",
            "balanced",
        )
        for s, r in ((0, 0), (1, 0), (4, 32))
    ]
    yield from _perplexity(evidence, contenders)
    yield from _fidelity(evidence, contenders, 2048)


def recall(evidence: Evidence) -> Iterator[Row]:
    """Recall of the exact top-k and captured mass by basis, rank and budget."""
    contenders = [
        loki(evidence, spec, rank=rank, top_k=k, sinks=0, recents=0, min_k=1)
        for spec in evidence.options.bases.split(",")
        for rank in (8, 16, 32)
        for k in (64, 256, 1024)
    ]
    yield from _fidelity(evidence, contenders, 4096)


def decode(evidence: Evidence) -> Iterator[Row]:
    """Perplexity and KL through the decode path."""
    contenders = []
    for k in (64, 128, 256, 512, 1024):
        contenders += [exact(top_k=k), streaming(top_k=k)]
        for rank in (16, 32):
            for dtype in ("bf16", "int8"):
                spec = evidence.options.default_basis
                name = f"{spec} top_k={k} rank={rank} {dtype}"
                contenders.append(loki(evidence, spec, name, top_k=k, rank=rank, plane_dtype=dtype))
    options = evidence.options
    ids = evidence.ids(options.prefix + options.forced, options.windows)
    yield from perplexity(
        evidence.lm,
        ids,
        contenders,
        how="decode",
        windows=options.windows,
        window_tokens=options.forced,
        prefix_tokens=options.prefix,
        corpus=options.texts,
        progress=_tell,
    )


def _perplexity(evidence: Evidence, contenders: list[Contender]) -> Iterator[Row]:
    options = evidence.options
    yield from perplexity(
        evidence.lm,
        evidence.ids(options.window, options.windows),
        contenders,
        how="every_query",
        windows=options.windows,
        window_tokens=options.window,
        corpus=options.texts,
        progress=_tell,
    )


def _fidelity(evidence: Evidence, contenders: list[Contender], tokens: int) -> Iterator[Row]:
    options = evidence.options
    yield from fidelity(
        evidence.lm,
        evidence.ids(tokens, options.windows),
        contenders,
        windows=options.windows,
        window_tokens=tokens,
        queries=48,
        corpus=options.texts,
    )


def _say(news: str) -> None:
    print(news, flush=True)


def _tell(done: int, total: int, news: str) -> None:
    _say(f"{done}/{total} {news}")


_SECTIONS: Final[dict[str, Callable[[Evidence], Iterator[Row]]]] = {
    f.__name__: f for f in (ranks, ordering, centring, recall, decode)
}


def main() -> None:
    """Run sections and append their rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="+", choices=sorted(_SECTIONS))
    for name, default in {
        "model": "smollm2-135m",
        "stats": "",
        "corpora": "",
        "out": "",
        "calibrated_on": "brown",
        "texts": "jargon,pydocs,shakespeare,kernel",
        "rank_corpora": "brown,pydocs",
        "ordering_bases": "pca,pca:side=pre,balanced",
        "bases": "pca,balanced,mixed",
        "default_basis": "balanced",
    }.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=default)
    for name, number in {
        "windows": 4,
        "window": 1024,
        "prefix": 4096,
        "forced": 128,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    options = parser.parse_args()
    evidence = Evidence(options)
    for section in options.sections:
        for row in _SECTIONS[section](evidence):
            append_rows(Path(options.out), [row])
            found = (f"{k}={v:.4g}" for k, v in row.metrics.items() if isinstance(v, float))
            _say(f"{row.task} {row.contender}: {' '.join(found)}")


if __name__ == "__main__":
    main()
