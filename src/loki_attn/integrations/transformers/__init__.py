"""The transformers door: `attach` a policy to a model and use the model as before."""

from loki_attn.integrations.transformers.attach import Attachment, attach
from loki_attn.integrations.transformers.function import Observation, Traffic

__all__ = ["Attachment", "Observation", "Traffic", "attach"]
