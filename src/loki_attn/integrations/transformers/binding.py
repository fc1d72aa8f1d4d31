"""Binding: a policy and what was calibrated for it, put on the layers of a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from transformers import PreTrainedModel

from loki_attn.artefact import JSON
from loki_attn.attention import LayerPolicy, bind
from loki_attn.basis import Basis
from loki_attn.policy import Policy
from loki_attn.profile import Profile
from loki_attn.rope import Rope
from loki_attn.types import LayerShape


@final
@dataclass(frozen=True)
class Calibrated:
    """What was calibrated for a policy.

    Attributes:
        basis: For methods that rank in a basis, or None.
        profile: For methods with tables or weights of their own, or None.
    """

    basis: Basis | None = None
    profile: Profile | None = None

    @classmethod
    def load(cls, basis: Basis | str | None, profile: Profile | str | None) -> "Calibrated":
        """Take objects as they are and read files."""
        return cls(
            Basis.load(basis) if isinstance(basis, str) else basis,
            Profile.load(profile) if isinstance(profile, str) else profile,
        )

    def check_model(self, shapes: Mapping[int, LayerShape], model: dict[str, JSON]) -> None:
        """Refuse a model that this was not made for.

        Args:
            shapes: Its full-attention layers by index.
            model: Its identity.

        Raises:
            LokiAttnError: If anything differs.
        """
        if self.basis is not None:
            for shape in shapes.values():
                self.basis.check_model(
                    layers=tuple(shapes),
                    num_kv_heads=shape.num_kv_heads,
                    head_dim=shape.head_dim,
                    model=model,
                )
        if self.profile is not None:
            self.profile.check_model(model)

    def used_by(self, policy: Policy) -> "Calibrated":
        """What of it a policy uses."""
        profiled = policy.select.needs_profile or policy.evict.needs_profile
        return Calibrated(
            self.basis if policy.select.needs_basis else None,
            self.profile if profiled else None,
        )


def bind_layers(
    model: PreTrainedModel,
    shapes: Mapping[int, LayerShape],
    policy: Policy,
    used: Calibrated,
    ropes: Mapping[int, Rope],
) -> dict[int, LayerPolicy]:
    """Bind a policy to every full-attention layer of a model, by layer index.

    Args:
        model: The model.
        shapes: Its full-attention layers by index.
        policy: The policy.
        used: What was calibrated for it.
        ropes: The layers' rotary embeddings, where they are known.
    """
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return {
        index: bind(
            policy, shape, num_layers, used.basis, profile=used.profile, rope=ropes.get(index)
        )
        for index, shape in shapes.items()
    }
