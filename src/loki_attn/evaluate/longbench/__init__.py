"""LongBench, versions 1 (arXiv 2308.14508) and 2 (arXiv 2412.15204): reading and scoring.

Nothing of the benchmark is packaged. `read_v1` and `read_v2` read its published files, from a local
path or from the hub; `score` computes its published metrics with code of our own.

The instructions around a context are in our words, so scores do not compare with published ones
as they stand. For those, put the benchmark's ``dataset2prompt.json`` (version 1) or ``0shot.txt``
(version 2) beside the data, and they are used instead; every sample's label `prompts` says which.
"""

from loki_attn.evaluate.longbench.catalogue import DATASETS, EXTENDED, V2, Dataset
from loki_attn.evaluate.longbench.cutting import cut_middle
from loki_attn.evaluate.longbench.reading import read_v1
from loki_attn.evaluate.longbench.reading_v2 import read_v2
from loki_attn.evaluate.longbench.scoring import score

__all__ = ["DATASETS", "EXTENDED", "V2", "Dataset", "cut_middle", "read_v1", "read_v2", "score"]
