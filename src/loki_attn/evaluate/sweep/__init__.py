"""Sweeps: models x policies x tasks x lengths from one YAML file, resumable at any point.

spec --expand--> tasks and policies of each model --measure, journal--> rows, each written once
"""

from loki_attn.evaluate.sweep.running import Host, run_model
from loki_attn.evaluate.sweep.spec import Spec, TaskChoice, read_spec

__all__ = ["Host", "Spec", "TaskChoice", "read_spec", "run_model"]
