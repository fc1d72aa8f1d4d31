"""Options that several commands share, with one meaning each.

Defaults that live in modules which need torch are repeated here, so that `--help` is quick; a test
holds them equal.
"""

from pathlib import Path
from typing import Annotated, Final

import typer

DEFAULT_MODEL: Final = "smollm2-135m"

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A short name, a local folder or a hub id (org/name).",
        show_default=True,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")
]
Dtype = Annotated[
    str, typer.Option(help="Dtype of the weights: auto, float32, bfloat16 or float16.")
]
BasisFile = Annotated[
    Path | None,
    typer.Option(
        "--basis",
        help="Basis file; without it, the one that `loki-attn calibrate` wrote for this model.",
    ),
]
EvalText = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help="UTF-8 text file; without it, the packaged text that calibration does not use.",
    ),
]
Policies = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        "-p",
        help="A preset, with changes like loki:top_k=256,rank=16,basis=FILE, or a policy's JSON "
        "file. Repeat it to compare.  [default: loki]",
        show_default=False,
    ),
]
Rows = Annotated[Path, typer.Option("--out", help="JSON-lines file that the rows are added to.")]
