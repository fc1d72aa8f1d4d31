"""`loki-attn doctor`: what this machine and this installation can do, and why not more."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import loki_attn
from loki_attn.cli import options, terminal
from loki_attn.errors import LokiAttnError

NAME: Final = "doctor"
EXAMPLE: Final = "Example: loki-attn doctor --json"

_REQUIRED: Final = ("torch", "numpy", "safetensors")
_OPTIONAL: Final = {
    "transformers": "models",
    "accelerate": "conversion of the embedded model",
    "gguf": "conversion of the embedded model",
    "matplotlib": "figures of a report",
    "rich": "command line",
    "typer": "command line",
    "triton": "GPU kernels",
    "vllm": "serving",
    "lm_eval": "task suites",
}
# What decides how fast rows of a cache can be scored: vector width, half and int8 products.
_CPU_FLAGS: Final = (
    "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip

# The fields of `loki_attn.kernels.native.describe`.
_NATIVE_WORDS: Final = {"isa": "instruction set", "isas": "can be had", "pool": "thread pool"}


def command(as_json: options.Json = False) -> None:
    """Show versions, the processor, backends, optional packages and the cache."""
    found = examine()
    if as_json:
        terminal.emit(found)
        return
    for title, columns, rows in _tables(found):
        terminal.table(title, columns, rows, left=True)


def examine() -> dict[str, Any]:
    """Look at everything; what cannot be had is said, never raised."""
    import torch

    return {
        "versions": {
            "python": platform.python_version(),
            "loki-attn": loki_attn.__version__,
            **{name: _version(name) for name in _REQUIRED},
        },
        "cpu": {
            "machine": platform.machine(),
            "name": _cpu_field("model name") or platform.processor(),
            "flags": _flags(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "cores": _cores(),
        },
        "threads": {
            "torch": torch.get_num_threads(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": _backends(),
        "native": _native(),
        "optional": {
            name: {"version": _version(name), "for": use} for name, use in _OPTIONAL.items()
        },
        "cache": _cache(),
    }


def _backends() -> dict[str, Any]:
    import torch

    from loki_attn.kernels import backends

    answers = []
    for name in backends.names():
        answer = backends.probe(name)
        reason = answer.reason if isinstance(answer, backends.Rejected) else None
        answers.append({"name": name, "accepted": reason is None, "reason": reason})
    on_gpu = None
    try:
        chosen, problem = backends.resolve().name, None
        if torch.cuda.is_available():
            on_gpu = backends.resolve(None, "cuda").name
    except LokiAttnError as error:
        chosen, problem = None, str(error)
    return {"chosen": chosen, "chosen_on_gpu": on_gpu, "problem": problem, "probed": answers}


def _native() -> dict[str, Any] | None:
    """The native kernels as they run here, or None where `_backends` says why they do not."""
    from loki_attn.kernels import backends

    if "native" not in backends.names():
        return None
    answer = backends.probe("native")
    if isinstance(answer, backends.Rejected):
        return None
    described: dict[str, Any] = answer.module.describe()
    return described


def _cache() -> dict[str, Any]:
    from loki_attn.models import SOURCES, cache_root

    root = cache_root()
    models = [
        {"name": folder.name, "bytes": sum(f.stat().st_size for f in folder.rglob("*.safetensors"))}
        for folder in sorted((root / "models").glob("*"))
        if (folder / "config.json").is_file()
    ]
    return {
        "folder": str(root),
        "models": models,
        "installable": sorted(set(SOURCES) - {model["name"] for model in models}),
        "bases": [_basis(path) for path in sorted((root / "bases").glob("*.safetensors"))],
        "unfinished": [path.name for path in sorted((root / "bases").glob("*.partial"))],
    }


def _basis(path: Path) -> dict[str, Any]:
    from loki_attn.basis import Basis

    try:
        basis = Basis.load(path)
    except LokiAttnError as error:
        return {"file": path.name, "kind": None, "problem": str(error)}
    return {"file": path.name, "kind": basis.kind, "problem": None}


def _tables(found: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The findings as titled tables."""
    cpu, cache, backends = found["cpu"], found["cache"], found["backends"]
    here = [
        *([name, version or "missing"] for name, version in found["versions"].items()),
        ["processor", f"{cpu['name']} ({cpu['machine']}, {cpu['cores']} cores)"],
        ["flags", " ".join(cpu["flags"]) or "none known"],
        ["torch kernels", cpu["torch_capability"]],
        ["threads", f"{found['threads']['torch']} (OMP_NUM_THREADS="
         f"{found['threads']['OMP_NUM_THREADS'] or 'unset'})"],
        ["GPU", found["gpu"] or "none"],
    ]  # fmt: skip
    probed = [
        [b["name"], "runs" if b["accepted"] else "rejected", b["reason"] or ""]
        for b in backends["probed"]
    ]
    chosen = [["chosen", backends["chosen"] or "none", backends["problem"] or ""]]
    if backends["chosen_on_gpu"]:
        chosen.append(["chosen on the GPU", backends["chosen_on_gpu"], ""])
    native = [
        [_NATIVE_WORDS.get(key, key), ", ".join(value) if isinstance(value, list) else str(value)]
        for key, value in (found["native"] or {}).items()
    ]
    optional = [
        [name, about["version"] or "not installed", about["for"]]
        for name, about in found["optional"].items()
    ]
    held = [
        ["folder", cache["folder"]],
        *(["model", f"{m['name']} ({m['bytes'] / 1e6:,.0f} MB)"] for m in cache["models"]),
        *(["can be had", name] for name in cache["installable"]),
        *(["basis", b["file"] + (f": {b['problem']}" if b["problem"] else "")]
          for b in cache["bases"]),
        *(["unfinished", name] for name in cache["unfinished"]),
    ]  # fmt: skip
    return [
        ("Here", ["what", "found"], here),
        ("Backends", ["backend", "verdict", "why"], probed + chosen),
        *([("Native kernels", ["what", "found"], native)] if native else []),
        ("Optional packages", ["package", "version", "for"], optional),
        ("Cache", ["what", "found"], held),
    ]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _flags() -> list[str]:
    present = set((_cpu_field("flags") or _cpu_field("Features")).split())
    return [flag for flag in _CPU_FLAGS if flag in present]


def _cpu_field(name: str) -> str:
    """A field of the first processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        field, _, value = line.partition(":")
        if field.strip() == name:
            return value.strip()
    return ""


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
