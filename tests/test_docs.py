"""What the pages show is run: every snippet, in order, a page in one namespace and one folder.

A tiny random model stands where the pages name the embedded one, so figures mean nothing here, but
every line does what it says. A block behind `<!-- not run: REASON -->` is an illustration: it is
read (Python compiled, options of commands checked), not run.
"""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
if not (DOCS / "conf.py").is_file():
    pytest.skip("a source distribution has no pages", allow_module_level=True)

MODEL = "smollm2-135m"
# Pages whose commands are read, not run; each with the reason.
READ_ONLY = {
    "docs/bench.md": "times this machine, at real sizes",
    "docs/lm-eval.md": "lm-eval is an optional package with data sets of its own",
}
# Pages that calibrate by themselves; the others stand on a model that was calibrated before.
FROM_NOTHING = {"README.md", "docs/index.md", "docs/tutorial.md", "docs/how-to/calibrate.md"}
MOST_ILLUSTRATIONS = 4
LANGUAGES = {"python", "sh", "console", "yaml"}
ROWS = "docs/reference/rows.md"  # run by a test of its own, which looks at what came of it
METRIC_ENDINGS = ("_low", "_high", "_delta")

NOT_RUN = re.compile(r"<!-- not run(?::\s*(?P<reason>.*?))?\s*-->")
FETCHED = re.compile(r"""<(?:script|img|link|iframe)\b[^>]*(?:src|href)=["'](https?:)?//""")
FENCE = re.compile(r"(?P<fence>`{3,})(?P<language>[^`]*)$")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int  # of its first line, from 1
    language: str
    text: str
    reason: str | None  # why it is not run; "" where none is given

    @property
    def place(self):
        return f"{self.page}:{self.line}"

    @property
    def commands(self):
        """Shell commands, one list of words each."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks_of(page):
    """The blocks of a page that hold something to run."""
    found, lines, at = [], (ROOT / page).read_text(encoding="utf-8").splitlines(), 0
    reason = None
    while at < len(lines):
        fence = FENCE.match(lines[at])
        if fence is None:
            mark = NOT_RUN.fullmatch(lines[at])
            if mark or lines[at].strip():
                reason = (mark["reason"] or "") if mark else None
            at += 1
            continue
        end = lines.index(fence["fence"], at + 1)
        if fence["language"] in LANGUAGES:
            text = "\n".join(lines[at + 1 : end])
            found.append(Block(page, at + 2, fence["language"], text, reason))
        reason, at = None, end + 1
    return found


def pages():
    """All pages that people read, but the results, which are rows and not instructions."""
    written = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "DESIGN.md",
        *DOCS.rglob("*.md"),
    ]
    names = sorted(path.relative_to(ROOT).as_posix() for path in written)
    return [name for name in names if not name.startswith("docs/results/")]


BLOCKS = {page: blocks_of(page) for page in pages()}
ILLUSTRATIONS = [b for blocks in BLOCKS.values() for b in blocks if b.reason is not None]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A llama of the embedded model's head size and context, but tiny and random."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from loki_attn import texts

    folder = tmp_path_factory.mktemp("docs") / MODEL
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([texts.load(name)[:100_000] for name in texts.names()], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=8192,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def calibrated(model, tmp_path_factory):
    """A folder with the model's bases, for pages that take them for granted."""
    import loki_attn
    from loki_attn import models, texts
    from loki_attn.integrations.transformers import collect_stats

    folder = tmp_path_factory.mktemp("bases")
    loaded, tokenizer = models.load(str(model))
    ids = tokenizer(texts.load("calibration")[:8000], return_tensors="pt").input_ids[0]
    stats, provenance = collect_stats(loaded, ids, tokens=1024, window=512)
    for kind in ("mixed", "pca"):
        basis = loki_attn.fit(stats, kind, provenance=provenance)
        basis.save(folder / f"{MODEL}-{kind}.safetensors")
    return folder


@pytest.fixture
def reader(model, calibrated, tmp_path, monkeypatch):
    """Run a page as its reader would, in a folder of his own."""

    def read(page):
        cache = tmp_path / "cache"
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        (cache / "loki-attn" / "models").mkdir(parents=True)
        (cache / "loki-attn" / "models" / MODEL).symlink_to(model)
        if page not in FROM_NOTHING:
            shutil.copytree(calibrated, cache / "loki-attn" / "bases")
        desk = tmp_path / "desk"
        desk.mkdir()
        monkeypatch.chdir(desk)
        monkeypatch.setattr("loki_attn.cli.evaluate.sweep.subprocess", InThisProcess)
        names = {"__name__": "page"}
        for block in BLOCKS[page]:
            if block.reason is not None or page in READ_ONLY:
                check(block)
            elif block.language == "python":
                exec(compiled(block), names)
            elif block.language == "yaml":
                (desk / file_name(block)).write_text(block.text)
            else:
                for words in block.commands:
                    run(block, words)
        return desk

    return read


class InThisProcess:
    """Stands for `subprocess` in a sweep: importing everything anew would take most of the time."""

    @staticmethod
    def run(command, *, check):
        assert not check
        from typer.testing import CliRunner

        from loki_attn.cli.app import app

        assert command[1:3] == ["-m", "loki_attn.cli"]
        done = CliRunner().invoke(app, command[3:])
        assert done.exit_code == 0, done.stderr
        return subprocess.CompletedProcess(command, done.exit_code)


def compiled(block):
    """The code of a block, with the line numbers of its page."""
    return compile("\n" * (block.line - 1) + block.text, str(ROOT / block.page), "exec")


def file_name(block):
    """The name that a reader is to save a YAML block under: the comment in its first line."""
    name = re.fullmatch(r"# ([\w-]+\.yaml)", block.text.partition("\n")[0])
    assert name, f"{block.place}: a YAML block begins with the name of its file"
    return name[1]


def check(block):
    """Read a block that is not run."""
    if block.language == "python":
        compiled(block)
        return
    if block.language == "yaml":
        file_name(block)
        return
    for words in block.commands:
        if words[0] == "loki-attn":
            parse(block, words[1:])
        else:
            check_shell(block, words)


def parse(block, words):
    """Refuse commands and options that do not exist."""
    from typer.main import get_command

    from loki_attn.cli.app import app

    command = get_command(app)
    while inner := getattr(command, "commands", {}):
        assert words, f"{block.place}: which command?"
        assert words[0] in inner, f"{block.place}: no command {words[0]!r}; there are {[*inner]}"
        command, words = inner[words[0]], words[1:]
    command.make_context(command.name, list(words))


def run(block, words):
    """Run a command of ours; of others, only look whether it could be run."""
    from typer.testing import CliRunner

    from loki_attn.cli.app import app

    if words[0] != "loki-attn":
        check_shell(block, words)
        return
    done = CliRunner().invoke(app, words[1:])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, f"{block.place}: {shlex.join(words)}\n{done.output}{done.stderr}"


def check_shell(block, words):
    """Commands that are not ours: what they name must exist."""
    match words:
        case ["make", *arguments]:
            targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            unknown = {word for word in arguments if "=" not in word} - set(targets)
            assert not unknown, f"{block.place}: make has no target {unknown}"
        case ["pip", "install", requirement]:
            name, _, extras = requirement.rstrip("]").partition("[")
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            known = set(project["optional-dependencies"])
            assert name == project["name"], block.place
            assert set(filter(None, extras.split(","))) <= known, block.place
        case [program, *_] if program.startswith(".venv/bin/"):
            tool = program.removeprefix(".venv/bin/")
            pins = (ROOT / "constraints.txt").read_text().lower()
            assert f"{tool}==" in pins or Path(sys.executable).with_name(tool).exists(), block.place
        case ["python", "-m", module, *_]:
            assert find_spec(module), f"{block.place}: no module {module}"
        case _ if block.page in READ_ONLY:
            pass  # a shell's own words: loops, variables
        case _:
            pytest.fail(f"{block.place}: nobody knows how to check {shlex.join(words)!r}")


@pytest.mark.parametrize(
    "page", [page for page, blocks in BLOCKS.items() if blocks and page != ROWS]
)
def test_snippets_run(page, reader):
    reader(page)


def test_illustrations_are_few_and_have_reasons():
    assert [b.place for b in ILLUSTRATIONS if not b.reason] == []
    assert len(ILLUSTRATIONS) <= MOST_ILLUSTRATIONS


WRONG = [
    ("python", "1 / 0", ZeroDivisionError),
    ("sh", "loki-attn calibrate --no-such-option 1", AssertionError),
    ("sh", "loki-attn no-such-command", AssertionError),
    ("sh", "make no-such-target", AssertionError),
    ("sh", "pip install loki-attn[no-such-extra]", AssertionError),
    ("sh", "rm -r somewhere", pytest.fail.Exception),
    ("yaml", "models: []", AssertionError),
]


@pytest.mark.parametrize(("language", "text", "error"), WRONG, ids=[text for _, text, _ in WRONG])
def test_a_snippet_that_fails_is_noticed(language, text, error, reader, monkeypatch):
    monkeypatch.setitem(BLOCKS, "wrong.md", [Block("wrong.md", 1, language, text, None)])
    with pytest.raises(error):
        reader("wrong.md")


@pytest.mark.parametrize("text", ["loki-attn eval nothing", "loki-attn inspect --no-such-option x"])
def test_an_illustration_that_is_wrong_is_noticed(text, reader, monkeypatch):
    monkeypatch.setitem(BLOCKS, "wrong.md", [Block("wrong.md", 1, "sh", text, "a reason")])
    with pytest.raises(Exception, match=r"No such option|no command"):
        reader("wrong.md")


def test_every_metric_of_a_row_is_explained(reader):
    from loki_attn.evaluate.results import read_rows

    desk = reader(ROWS)

    text = (ROOT / ROWS).read_text(encoding="utf-8")
    named = {name for row in read_rows(desk / "rows.jsonl") for name in row["metrics"]}
    assert len(named) > 10
    assert sorted(name for name in named if f"`{without_ending(name)}`" not in text) == []


def without_ending(name):
    """`nll` of `nll_delta_low`: endings are explained once."""
    for ending in METRIC_ENDINGS:
        name = name.removesuffix(ending)
    return name


@pytest.mark.slow
def test_site_builds_without_a_warning_lists_everything_and_reads_offline(tmp_path):
    pytest.importorskip("sphinx", reason="the site is built with sphinx; install the docs extra")
    pytest.importorskip("myst_parser")
    pytest.importorskip("furo")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", DOCS, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    assert missing_names(tmp_path / "reference") == {}
    assert [p.name for p in tmp_path.rglob("*.html") if FETCHED.search(p.read_text())] == []
    assert "<math" in (tmp_path / "explanation" / "low-rank-keys.html").read_text()


def missing_names(reference):
    """By page of the reference, what the library has and the page does not name."""
    from typer.main import get_command

    import loki_attn
    from loki_attn.cli.app import app
    from loki_attn.policy import methods, presets

    expected = {
        "methods": methods(),
        "policies": presets(),
        "command-line": get_command(app).commands,
        "python": loki_attn.__all__,
    }
    pages = {page: (reference / f"{page}.html").read_text() for page in expected}
    found = {page: [n for n in names if n not in pages[page]] for page, names in expected.items()}
    return {page: names for page, names in found.items() if names}
