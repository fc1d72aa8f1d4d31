"""The lm-eval door: importing it registers the model "loki-attn" with lm-evaluation-harness."""

try:
    import lm_eval as _  # noqa: F401 (so that what is missing is said in our words)
except ModuleNotFoundError as error:
    if error.name != "lm_eval":
        raise
    raise ModuleNotFoundError(
        "This needs lm-evaluation-harness, which is not installed; run: pip install "
        "'loki-attn[lm-eval]'",
        name="lm_eval",
    ) from error

from loki_attn.integrations.lm_eval.commands import run
from loki_attn.integrations.lm_eval.language_model import LokiLM
from loki_attn.integrations.lm_eval.rows import read_results, rows

__all__ = ["LokiLM", "read_results", "rows", "run"]
