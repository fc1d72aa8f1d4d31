"""The transformers door: `attach` a policy to a model and use the model as before."""

from loki_attn.integrations.transformers.attachment import Attachment, attach
from loki_attn.integrations.transformers.calibration import calibrate, collect_stats
from loki_attn.integrations.transformers.function import Observation
from loki_attn.integrations.transformers.language_model import TransformersLM
from loki_attn.integrations.transformers.second_pass import Prompt
from loki_attn.integrations.transformers.traffic import Traffic

__all__ = [
    "Attachment",
    "Observation",
    "Prompt",
    "Traffic",
    "TransformersLM",
    "attach",
    "calibrate",
    "collect_stats",
]
