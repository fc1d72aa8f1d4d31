import builtins
import re

import pytest

from loki_attn.errors import InputError, ModelError
from loki_attn.evaluate import longbench
from loki_attn.models.datasets import fetch_dataset_file

HUB = pytest.importorskip("huggingface_hub")
ERRORS = pytest.importorskip("huggingface_hub.errors")


@pytest.fixture
def hub(monkeypatch):
    """Answer for the hub with a file or an error, and keep what was asked."""

    def answer(result):
        asked = []

        def download(*arguments, **options):
            asked.append((arguments, options))
            if isinstance(result, Exception):
                raise result
            return str(result)

        monkeypatch.setattr(HUB, "hf_hub_download", download)
        return asked

    return answer


def test_a_hub_id_is_fetched(hub, record, write):
    asked = hub(write("hotpotqa.jsonl", record()))
    assert [one.name for one in longbench.read_v1("THUDM/LongBench")] == ["hotpotqa/a1"]
    assert asked == [(("THUDM/LongBench", "data.zip"), {"repo_type": "dataset"})]


def test_version_2_has_another_file_on_the_hub(hub, record_v2, write):
    asked = hub(write("data.json", record_v2()))
    assert [one.name for one in longbench.read_v2("THUDM/LongBench-v2")] == ["longbench-v2/b1"]
    assert asked == [(("THUDM/LongBench-v2", "data.json"), {"repo_type": "dataset"})]


@pytest.mark.parametrize(
    "path", ["none.jsonl", "data/none.jsonl", "{here}/none", "../none/none", "none"]
)
def test_a_mistyped_path_asks_no_network(hub, tmp_path, path):
    asked = hub(AssertionError("asked"))
    path = path.format(here=tmp_path)
    with pytest.raises(InputError, match=re.escape(f"No file or folder at {path!r}; expected")):
        longbench.read_v1(path)
    assert asked == []


@pytest.mark.parametrize(
    "error",
    [
        ERRORS.OfflineModeIsEnabled("no net\nand more"),
        ERRORS.LocalEntryNotFoundError("no net"),
        ERRORS.HFValidationError("no net"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_hub_out_of_reach_is_said(hub, error):
    hub(error)
    message = (
        "Cannot fetch 'data.zip' of data set 'a/b' from the hub: no net; check the name and the "
        "network, or download the file and give its path"
    )
    with pytest.raises(ModelError, match=re.escape(message)):
        fetch_dataset_file("a/b", "data.zip")


def test_a_missing_package_is_named(monkeypatch):
    real = builtins.__import__

    def without_hub(name, *rest, **more):
        if name == "huggingface_hub":
            raise ModuleNotFoundError("No module named 'huggingface_hub'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_hub)
    with pytest.raises(ModelError, match=r"needs huggingface_hub .*pip install 'loki-attn\["):
        fetch_dataset_file("a/b", "data.zip")
