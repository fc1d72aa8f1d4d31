"""What the selection costs: captured mass, perplexity and divergence, beside two other methods."""

from collections.abc import Mapping, Sequence
from typing import Any

from loki_attn import texts
from loki_attn.demo.continuation import CORPUS
from loki_attn.demo.stage import DENSE, Stage, note, plain_table
from loki_attn.evaluate.fidelity import fidelity
from loki_attn.evaluate.perplexity import perplexity
from loki_attn.evaluate.protocol import Contender
from loki_attn.evaluate.results import Row


def measure(stage: Stage, contenders: Sequence[Contender]) -> None:
    """Judge the contenders and show what was found."""
    plan, console, lm = stage.plan, stage.console, stage.lm
    ids = lm.encode(texts.load(CORPUS))
    console.print(
        f"Per layer: {plan.queries} queries of a window of {plan.fidelity:,} tokens choose their "
        "rows; how much of dense attention's weight lies on them?"
    )
    with console.status("judging every layer's choice"):
        kept = fidelity(
            lm,
            ids,
            contenders,
            windows=1,
            window_tokens=plan.fidelity,
            queries=plan.queries,
            corpus=CORPUS,
        )
    stage.keep(kept)
    _show_fidelity(stage, kept)
    console.print(
        f"Next-token loss: {plan.prefix:,} tokens read densely, then {plan.forced} forced through "
        "the decode path, one by one (loss and KL in nats, 95 % intervals in brackets)."
    )
    with console.status("reading the prefix") as status:

        def tell(done: int, total: int, line: str) -> None:
            news = f"{done}/{total}: {' '.join(line.split())}"
            status.update(news)
            if not console.is_terminal:
                note(console, news)

        cost = perplexity(
            lm,
            ids,
            contenders,
            windows=1,
            window_tokens=plan.forced,
            prefix_tokens=plan.prefix,
            corpus=CORPUS,
            progress=tell,
        )
    stage.keep(cost)
    _show_perplexity(stage, cost)


def _show_fidelity(stage: Stage, rows: Sequence[Row]) -> None:
    table = plain_table("", "captured mass", "weakest layer", "recall of exact", "output error")
    for row in rows:
        found = row.metrics
        table.add_row(
            row.contender,
            f"{found['mass']:.2%}",
            f"{min(found['layers']['mass']):.2%}",
            f"{found['recall']:.1%}",
            f"{found['output_error']:.3f}",
        )
    stage.console.print(table)
    stage.summary.append(("captured attention mass", "100%", f"{rows[0].metrics['mass']:.2%}"))


def _show_perplexity(stage: Stage, rows: Sequence[Row]) -> None:
    table = plain_table(
        "", "perplexity", "loss - dense", "KL to dense", "same top token", "KV bytes read"
    )
    dense = rows[0].metrics["perplexity_dense"]
    table.add_row(DENSE, f"{dense:.3f}", "0", "0", "100%", "100%")
    for row in rows:
        found = row.metrics
        table.add_row(
            row.contender,
            f"{found['perplexity']:.3f}",
            _with_interval(found, "nll_delta", "+.3f"),
            _with_interval(found, "kl_to_dense", ".4f"),
            f"{found['top1_agreement']:.1%}",
            f"{found['read_bytes_share']:.1%}",
        )
    stage.console.print(table)
    loki = rows[0].metrics
    stage.summary += [
        (f"perplexity, {stage.plan.forced} tokens", f"{dense:.3f}", f"{loki['perplexity']:.3f}"),
        ("KL to dense, nats", "0", f"{loki['kl_to_dense']:.4f}"),
    ]


def _with_interval(found: Mapping[str, Any], name: str, form: str) -> str:
    low, high = found[f"{name}_low"], found[f"{name}_high"]
    return f"{found[name]:{form}} [{low:{form}}, {high:{form}}]"
