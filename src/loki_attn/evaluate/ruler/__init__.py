"""RULER (arXiv 2404.06654): thirteen tasks on long contexts, made for a tokenizer and a length.

Structure, parameters and scores are the published ones, the texts our own. What needs data that
cannot be shipped is replaced, and `SUBSTITUTES` says by what.
"""

from loki_attn.evaluate.ruler.families import SUBSTITUTES, TASKS, Family
from loki_attn.evaluate.ruler.generating import samples, score

__all__ = ["SUBSTITUTES", "TASKS", "Family", "samples", "score"]
