"""Importing loki_attn needs torch and numpy only, and changes nothing in the host process."""

import subprocess
import sys
from pathlib import Path

import pytest

OPTIONAL_PACKAGES = (
    "accelerate",
    "gguf",
    "jinja2",
    "lm_eval",
    "matplotlib",
    "rich",
    "transformers",
    "triton",
    "typer",
    "vllm",
    "yaml",
)
NEEDS_A_FRAMEWORK = {"attach", "calibrate"}

BLOCK_OPTIONAL_PACKAGES = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL_PACKAGES!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked by the test", name=name)

sys.meta_path.insert(0, Block())
"""

COMPARE_REGISTRIES = """
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

def registered():
    return {
        (kind, name, id(registry[name]))
        for kind, registry in enumerate([ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS])
        for name in registry
    }

before = registered()
import loki_attn
for name in loki_attn.__all__:
    getattr(loki_attn, name)
assert registered() == before, registered() ^ before
"""


def run_fresh(code):
    """Run code in an interpreter that has imported nothing yet."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_blocker_blocks():
    with pytest.raises(AssertionError, match="transformers is blocked by the test"):
        run_fresh(BLOCK_OPTIONAL_PACKAGES + "import transformers")


def test_core_works_without_optional_packages():
    public = (Path(__file__).parent / "public_api.txt").read_text().split()
    core = sorted(set(public) - NEEDS_A_FRAMEWORK)
    run_fresh(
        f"{BLOCK_OPTIONAL_PACKAGES}\n"
        "import loki_attn\n"
        f"for name in {core!r}:\n"
        "    getattr(loki_attn, name)\n"
    )


def test_import_leaves_the_host_framework_alone():
    pytest.importorskip("transformers")
    run_fresh(COMPARE_REGISTRIES)
