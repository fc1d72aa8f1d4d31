"""Dense peers on a device: torch with its flash kernel forced, flash-attn, FlashInfer.

All of them read the same buffers as our own contenders, as views; none gets a copy. A library that
is not installed is left out, with the reason.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from loki_attn.bench.contenders import HF, Contender, torch_forms
from loki_attn.bench.layers import Layer, Plan
from loki_attn.bench.place import Peers
from loki_attn.errors import InputError

FLASH_ATTN: Final = "flash-attn"
FLASH_ATTN_3: Final = "flash-attn-3"
FLASHINFER: Final = "flashinfer"
_GROUP_ROWS: Final = "sdpa-group-rows"
_REPEAT: Final = "sdpa-repeat-kv"
_WORKSPACE_BYTES: Final = 256 << 20
_PAGE_ROWS: Final = 16

Step = Callable[[int], Tensor]


def device_peers(plan: Plan, layers: Sequence[Layer]) -> Peers:
    """Everybody dense who can be tried on this device.

    Args:
        plan: Sizes, dtype and device.
        layers: What they read when they run.
    """
    left_out = {}
    found = []
    for form in torch_forms(plan, layers):
        if form.name == _REPEAT:
            left_out[_REPEAT] = "it copies all rows for every query head: no memory for that"
            continue
        found.append(form)
        if form.name in {HF, _GROUP_ROWS}:
            found.append(_flash(form))
    touched = plan.context * plan.row_bytes()
    for name, (module, made) in _LIBRARIES.items():
        try:
            step = made(import_module(module), plan, layers)
        except (ImportError, OSError) as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == module
            why = "is not installed" if missing else f"cannot be loaded: {error}"
            left_out[name] = f"{module} {why}"
            continue
        found.append(
            Contender(name=name, kind="library", stages=(("", step),), touched_bytes=(touched,))
        )
    return Peers(found, left_out)


def _flash(form: Contender) -> Contender:
    """The same form with torch's flash kernel or none."""
    ((_, plain),) = form.stages

    def forced(index: int) -> Any:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return plain(index)

    name = form.name.replace("sdpa", "sdpa-flash")
    return replace(form, name=name, stages=(("", forced),))


def _flash_attn(module: Any, plan: Plan, layers: Sequence[Layer]) -> Step:
    """flash-attn's kernel for decoding, [batch, tokens, heads, dim]; its strides are free."""
    scaling = plan.call.scaling
    attend = module.flash_attn_with_kvcache

    def step(index: int) -> Tensor:
        layer = layers[index]
        query, keys, values = (
            rows.transpose(1, 2) for rows in (layer.query, layer.keys, layer.values)
        )
        out: Tensor = attend(query, keys, values, softmax_scale=scaling, causal=False)
        return out.transpose(1, 2)

    return step


def _flashinfer(module: Any, plan: Plan, layers: Sequence[Layer]) -> Step:
    """FlashInfer's batched decode over pages, which are views of the same rows.

    Rows lie head by head, so that every pair of batch row and KV head is a request of its own, with
    the query heads of its group. Pages are small because FlashInfer shares out whole ones. What it
    plans depends on lengths alone: one plan, made outside of the graph, serves all layers.
    """
    planned: list[Any] = []
    requests, group = plan.batch * plan.shape.num_kv_heads, plan.shape.group
    size = (requests * plan.context // _PAGE_ROWS, 1, _PAGE_ROWS, plan.shape.head_dim)

    def step(index: int) -> Tensor:
        if plan.context % _PAGE_ROWS:
            raise InputError(f"it reads pages of {_PAGE_ROWS} rows, and the last is not full")
        if not planned:
            planned.append(_planned(module, plan))
        layer = layers[index]
        query = layer.query.view(requests, group, plan.shape.head_dim)
        out: Tensor = planned[0].run(query, (layer.keys.view(size), layer.values.view(size)))
        return out.view(layer.query.shape)

    return step


def _planned(module: Any, plan: Plan) -> Any:
    """FlashInfer's wrapper with its plan for one layer."""
    shape, device = plan.shape, plan.device
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    # Tensor cores pay as soon as several query heads share a KV head.
    own = module.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "HND", use_tensor_cores=shape.group > 1
    )
    requests, pages = plan.batch * shape.num_kv_heads, plan.context // _PAGE_ROWS
    own.plan(
        torch.arange(requests + 1, dtype=torch.int32, device=device) * pages,
        torch.arange(requests * pages, dtype=torch.int32, device=device),
        torch.full((requests,), _PAGE_ROWS, dtype=torch.int32, device=device),
        shape.group,
        1,
        shape.head_dim,
        _PAGE_ROWS,
        q_data_type=plan.dtype,
        kv_data_type=plan.dtype,
        sm_scale=plan.call.scaling,
    )
    return own


_LIBRARIES: Final[dict[str, tuple[str, Callable[[Any, Plan, Sequence[Layer]], Step]]]] = {
    FLASH_ATTN: ("flash_attn", _flash_attn),
    FLASH_ATTN_3: ("flash_attn_interface", _flash_attn),
    FLASHINFER: ("flashinfer", _flashinfer),
}
