"""A tiny random llama with a byte-level tokenizer in a folder, and a runner of commands."""

import json
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
transformers = pytest.importorskip("transformers")

CONTEXT_TOKENS = 1024
TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|answer|>{% endif %}"
)


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self):
        return json.loads(self.stdout)

    @property
    def error(self):
        """The one error line of a command that was refused."""
        assert (self.code, self.stdout) == (2, ""), (self.stdout, self.stderr)
        lines = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.stderr
        assert "Traceback" not in self.stderr
        return lines[0]


def save_tiny_model(folder, seed=0):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from loki_attn import texts

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [texts.load("calibration")[:20_000]],
        trainers.BpeTrainer(
            vocab_size=512,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|end|>", "<|user|>", "<|answer|>"],
            show_progress=False,
        ),
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="session")
def other_model(tmp_path_factory):
    """Of the same shape, with other weights."""
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=1))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "loki-attn"


@pytest.fixture
def loki(cache):
    """Run the command line in this process; every path it makes up lies in `cache`."""
    from typer.testing import CliRunner

    from loki_attn.cli.app import app

    def run(*arguments, raises=()):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if done.exception is not None and not isinstance(done.exception, (SystemExit, *raises)):
            raise done.exception
        return Done(done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture
def calibrate(loki, model):
    """Calibrate the tiny model on a few short windows."""

    def run(*arguments):
        return loki("calibrate", "--model", model, "--tokens", 512, "--window", 128, *arguments)

    return run


@pytest.fixture(scope="session")
def bases(model, tmp_path_factory):
    """A balanced and a pca basis of the tiny model, as files by kind."""
    from typer.testing import CliRunner

    from loki_attn.cli.app import app

    folder = tmp_path_factory.mktemp("bases")
    stats = folder / "stats.safetensors"
    run = ["--model", model, "--tokens", "512", "--window", "128", "--stats-out", str(stats)]
    made = {kind: folder / f"{kind}.safetensors" for kind in ("mixed", "pca")}
    for kind, source in (("mixed", run), ("pca", ["--stats", str(stats)])):
        done = CliRunner().invoke(
            app, ["calibrate", *source, "--kind", kind, "--out", str(made[kind])]
        )
        assert done.exit_code == 0, done.output
    return {**made, "stats": stats}


@pytest.fixture
def write(tmp_path):
    """Write a file and return its path."""

    def make(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make
