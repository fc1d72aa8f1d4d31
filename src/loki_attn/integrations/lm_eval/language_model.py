"""LokiLM: a transformers model in lm-evaluation-harness that attends by a policy, and counts."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Self, get_args

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from loki_attn.basis import Basis
from loki_attn.errors import InputError, LokiAttnError, unknown_name
from loki_attn.integrations.lm_eval import arguments
from loki_attn.integrations.transformers import Attachment, attach
from loki_attn.integrations.transformers.identity import identity
from loki_attn.models import SOURCES, resolve
from loki_attn.policy import Policy, as_policy
from loki_attn.profile import Profile
from loki_attn.provenance import provenance
from loki_attn.types import Mode

NAME: Final = "loki-attn"

# lm-eval's requests: (encoded strings or None, context tokens, continuation tokens).
_Request = tuple[Any, list[int], list[int]]


@register_model(NAME)
class LokiLM(HFLM):
    """A model of lm-eval's "hf" kind under a policy; detach it with `close` or a `with` block.

    Mode "decode" reads prompts densely and selects in single-token steps. Log-likelihood requests,
    which lm-eval answers with one forward and no step, are then teacher-forced: every scored token
    is predicted by a step of its own, one request at a time. Mode "every_query" keeps the one
    forward and lets each of its rows select for itself.

    Args:
        pretrained: A model, or what it is loaded from: a short name of `loki_attn.models`, a
            folder or a hub id.
        policy: A `Policy`, the name of a preset, or the path of a policy's JSON file.
        basis: A `Basis` or the path of its file; None takes the cached basis of the model.
        profile: A `Profile` or the path of its file; None takes the cached one of the model.
        mode: "decode" or "every_query".
        prefix_tokens: Under "decode", first tokens of every log-likelihood window that are read at
            once and densely even where they are scored. 0 forces every scored token.
        options: Arguments of `HFLM` (tokenizer, dtype, batch_size, max_length, device, ...), and
            fields of a preset to replace (top_k, rank, ...).

    Attributes:
        attachment: The policy on the model.
        contender: The policy's label.

    Raises:
        UnknownNameError: If an argument or the mode is not known.
        LokiAttnError: If model, policy and basis do not fit.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        policy: Policy | str = "loki",
        basis: Basis | str | Path | None = None,
        profile: Profile | str | Path | None = None,
        mode: Mode = "decode",
        prefix_tokens: int = 0,
        **options: Any,
    ) -> None:
        """Refuse what can be refused before the model is loaded; then load it and attach."""
        host, changes = arguments.split(options)
        chosen = as_policy(policy, **changes)
        if mode not in get_args(Mode):
            raise unknown_name("mode", str(mode), get_args(Mode))
        arguments.check_batch_size(host.get("batch_size"))
        arguments.check_prefix(prefix_tokens)
        named = isinstance(pretrained, str)
        given = pretrained if named else str(getattr(pretrained.config, "_name_or_path", "") or "")
        found = arguments.find_basis(chosen, basis, given)
        learnt = arguments.find_profile(chosen, profile, given)
        if named:
            pretrained = str(resolve(pretrained)) if pretrained in SOURCES else pretrained
            host.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained=pretrained, **host)
        if self.world_size > 1:
            raise InputError(
                f"loki-attn counts the calls of one process, got {self.world_size}; start lm-eval "
                "without accelerate launch."
            )
        self.contender = arguments.label(policy, changes)
        self.prefix_tokens = prefix_tokens
        self.attachment: Attachment = attach(
            self.model, chosen, basis=found, profile=learnt, mode=mode
        )
        self._traffic: dict[str, dict[str, dict[str, int]]] = {}
        self._scored: dict[tuple[int, ...], int] = {}

    def __enter__(self) -> Self:
        """Return the model."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Detach."""
        self.close()

    def close(self) -> None:
        """Restore the transformers model."""
        self.attachment.detach()

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuse lm-eval's cache of responses, whose keys do not know the policy.

        Raises:
            InputError: Always.
        """
        del cache_hook
        raise InputError(
            "lm-eval's cache of responses tells requests apart, not policies: one policy would be "
            "scored with another's answers; drop use_cache."
        )

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Answer lm-eval's requests of this kind, and count the selecting calls of each task.

        Raises:
            LokiAttnError: If the policy never selected in a task: its score would be dense's.
        """
        answer = super().loglikelihood
        return self._by_task("loglikelihood", requests, lambda r: answer(r, disable_tqdm))

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Answer lm-eval's requests of this kind; counts and raises as `loglikelihood`."""
        answer = super().loglikelihood_rolling
        return self._by_task("loglikelihood_rolling", requests, lambda r: answer(r, disable_tqdm))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer lm-eval's requests of this kind; counts and raises as `loglikelihood`."""
        answer = super().generate_until
        return self._by_task("generate_until", requests, lambda r: answer(r, disable_tqdm))

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval merges into the "config" of its results; ours is under "loki_attn"."""
        return {**super().get_model_info(), "loki_attn": self.record()}

    def record(self) -> dict[str, Any]:
        """Model, policy, basis and mode, and by task and kind of request what attention read.

        Returns:
            Plain JSON. The counts are of the last time that a task was run.
        """
        basis = self.attachment.basis
        known = provenance()
        known["versions"] = {**known["versions"], "lm_eval": metadata.version("lm_eval")}
        return {
            "contender": self.contender,
            "model": {
                **identity(self.model),
                "dtype": str(self.model.dtype).removeprefix("torch."),
            },
            "policy": json.loads(self.attachment.policy.to_json()),
            "basis": None if basis is None else origin(basis),
            "mode": self.attachment.mode,
            "prefix_tokens": self.prefix_tokens,
            "max_length": self.max_length,
            "batch_size": self.batch_size,
            "traffic": self._traffic,
            "provenance": known,
        }

    def _by_task(
        self, kind: str, requests: Sequence[Any], answer: Callable[[list[Any]], list[Any]]
    ) -> list[Any]:
        """Answer the requests task by task, because counts and refusals are a task's."""
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(str(request.task_name), []).append(place)
        answers: list[Any] = [None] * len(requests)
        for task, own in places.items():
            self.attachment.traffic.reset()
            for place, given in zip(own, answer([requests[p] for p in own]), strict=True):
                answers[place] = given
            self._traffic.setdefault(task, {})[kind] = asdict(self.attachment.traffic)
            self._require_acted(task, kind)
        return answers

    def _require_acted(self, task: str, kind: str) -> None:
        traffic, policy = self.attachment.traffic, self.attachment.policy
        acted = traffic.sparse_calls + traffic.every_query_calls + traffic.evicted_rows
        if acted or (policy.budget.reads_everything and not policy.evicts):
            return
        raise LokiAttnError(
            f"{self.contender} never selected anything in task {task!r} ({kind}, mode "
            f"{self.attachment.mode!r}): {traffic.dense_calls} single-token layer calls read "
            "everything, so its score would be dense's. Lower the budget or dense_below, or "
            "lengthen the prompts or answers."
        )

    def _loglikelihood_tokens(
        self,
        requests: Sequence[_Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Note how many tokens of each window are scored, for `_model_call` to force them."""
        if self.attachment.mode != "decode":
            done: list[tuple[float, bool]] = super()._loglikelihood_tokens(
                requests, disable_tqdm=disable_tqdm, override_bs=override_bs
            )
            return done
        for _, context, continuation in requests:
            window = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
            # Requests of equal windows share one call, with the longest continuation's rows.
            self._scored[window] = max(self._scored.get(window, 0), len(continuation))
        batch_size, self.batch_size_per_gpu = self.batch_size, 1
        try:
            done = super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=1)
        finally:
            self.batch_size_per_gpu = batch_size
            self._scored = {}
        return done

    def _model_call(
        self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Logits of a window; under "decode" those of its scored rows, through single steps."""
        if self.attachment.mode != "decode":
            logits: Tensor = super()._model_call(inps, attn_mask, labels)
            return logits
        length = inps.shape[1]
        scored = self._scored[tuple(inps[0].tolist())]
        prefix = max(length - scored, min(self.prefix_tokens, length))
        with (
            torch.no_grad(),
            torch.autocast(
                device_type=self.device.type,
                dtype=self.mixed_precision_dtype,
                enabled=self.mixed_precision_dtype is not None,
            ),
        ):
            return self._forced(inps, prefix, prefix - (length - scored))

    def _forced(self, ids: Tensor, prefix: int, kept: int) -> Tensor:
        """Read `prefix` tokens at once, then one per call.

        Args:
            ids: int64 [1, n].
            prefix: Tokens that are read at once, 0 to n.
            kept: Last rows of the prefix whose logits are wanted.

        Returns:
            [1, kept + n - prefix, vocabulary]; lm-eval counts rows from the end.
        """
        cache = self.attachment.cache(reserve_tokens=ids.shape[1])
        rows = []
        if prefix and kept:
            out = self.model(ids[:, :prefix], past_key_values=cache, use_cache=True)
            rows.append(out.logits[:, prefix - kept :])
        elif prefix:
            self.model.base_model(ids[:, :prefix], past_key_values=cache, use_cache=True)
        for token in ids[:, prefix:].unbind(1):
            out = self.model(token[:, None], past_key_values=cache, use_cache=True)
            rows.append(out.logits)
        return torch.cat(rows, 1)


def origin(basis: Basis) -> dict[str, Any]:
    """Kind, side and provenance of a basis, as rows state them."""
    return {**basis.provenance, "kind": basis.kind, "side": basis.side}
