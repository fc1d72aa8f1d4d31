"""Measure full budget against stock attention on every architecture, as a Markdown page.

    python tools/architecture_table.py > docs/architectures.md

The models are tiny and random (tests/integrations/tiny_models.py), the law is the one of
tests/integrations/test_architectures.py, and nothing is downloaded.
"""

import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integrations"))

from full_budget import NEW_TOKENS, PATHS, compare, names
from tiny_models import REFUSED, SERVED, build

import loki_attn
from loki_attn.errors import UnsupportedModelError

INTRODUCTION = """\
# Architectures

Written by `python tools/architecture_table.py` with transformers {transformers}, torch {torch},
loki-attn {loki_attn}, in float32 on the CPU.

Every row is a tiny model with random weights whose logits have a standard deviation of about 2. It
generates {new} tokens greedily from a left-padded batch of 2, past the end of its window where it
has one; stock `generate` does the same. **All tokens are equal in every row and column.** The
figures are the largest absolute difference of a logit over all steps: rounding, nothing else. A
difference of 0 means that our dense path calls torch exactly as transformers does.

- *dense path*: the policy reads everything, so nothing is selected.
- The other columns read everything too, but by selecting it (`attachment.always_select`): scores,
  choice and the attention to the chosen rows are all computed. *planes* is Loki with an int8 lead
  plane, *rotated* keeps its keys in the basis; both with rank 4 of a random orthogonal basis.
- *sparse* counts the layers that a policy makes sparse. Layers with a sliding window or linear
  attention stay as they are. Stock attention is `sdpa`, but `eager` for Gemma2 and gpt-oss, whose
  soft-cap and sinks `sdpa` does not know.

The same test passes with transformers 5.5.4 (the floor), 5.13.1 and 5.16.1, as far as they have
these models.
"""

REFUSALS = """\
## Refused

`attach` probes the model before anything else and leaves it as it was:
"""


def main() -> None:
    """Print the page."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    compared = {name: compare(name) for name in names()}
    print(
        INTRODUCTION.format(
            transformers=transformers.__version__,
            torch=torch.__version__,
            loki_attn=loki_attn.__version__,
            new=NEW_TOKENS,
        )
    )
    titles = ["architecture", "sparse", *PATHS]
    print_row(titles)
    print_row(["---", *["---:"] * (len(titles) - 1)])
    for name, got in compared.items():
        if not all(got.same_tokens.values()):
            raise SystemExit(f"{name} generates other tokens: {got}")
        sparse = f"{got.full_layers} of {got.layers}"
        print_row([name, sparse, *(f"{got.differences[path]:.0e}" for path in PATHS)])
    missing = [architecture.missing for architecture in SERVED.values() if architecture.missing]
    print("".join(f"\n- {reason}." for reason in missing))
    print(REFUSALS)
    print_row(["model", "reason"])
    print_row(["---", "---"])
    for name, architecture in REFUSED.items():
        print_row([name, architecture.missing or refusal(name)])


def refusal(name: str) -> str:
    """The message with which a model is refused."""
    try:
        loki_attn.attach(build(REFUSED[name]), "exact-topk").detach()
    except UnsupportedModelError as error:
        return str(error)
    raise SystemExit(f"{name} was to be refused, but it is served.")


def print_row(cells: list[str]) -> None:
    """Print one row of a Markdown table."""
    print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
