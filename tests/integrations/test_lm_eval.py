"""The lm-eval door: every figure comes from calls that selected, and dense stays dense."""

import importlib
import importlib.resources
import json
import math
import sys
import warnings

import pytest
import torch

pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from loki_attn.integrations import lm_eval as door
    from loki_attn.integrations.lm_eval import LokiLM, read_results, rows
    from loki_attn.integrations.lm_eval.scores import score

from sparse_policies import FEW, METHODS
from tiny_models import build, random_basis

from loki_attn import Budget, Policy, models, texts
from loki_attn.errors import BasisError, InputError, LokiAttnError, PolicyError, UnknownNameError
from loki_attn.report.rows import sections

# lm-eval and what it brings along warn of their own affairs.
pytestmark = pytest.mark.filterwarnings("ignore")

LAYERS = 2
WINDOW = 100
DOCUMENTS = 3
EXACT = Policy(select=METHODS["exact_topk"], budget=FEW)
ALL = Policy(select=METHODS["exact_topk"], budget=Budget(fraction=1.0))
ROLLING, CHOICE, LETTER, ANSWER = "tiny_rolling", "tiny_choice", "tiny_letter", "tiny_answer"
TASKS = {
    ROLLING: """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
    """,
    CHOICE: """
        output_type: multiple_choice
        doc_to_text: "{{context}}"
        doc_to_choice: "{{choices}}"
        doc_to_target: gold
        metric_list: [{metric: acc}, {metric: acc_norm}]
    """,
    # One token each: lm-eval answers the choices of a context from one forward.
    LETTER: """
        output_type: multiple_choice
        doc_to_text: "{{context}}"
        doc_to_choice: ["A", "B", "C"]
        doc_to_target: gold
        target_delimiter: ""
        metric_list: [{metric: acc}]
    """,
    ANSWER: """
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "{{choices[0]}}"
        generation_kwargs: {max_gen_toks: 8, do_sample: false, until: []}
        metric_list: [{metric: exact_match}]
    """,
}


@pytest.fixture(autouse=True)
def no_description_of_the_machine(monkeypatch):
    """Lm-eval asks a dozen programs what machine this is, at every run."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)


def passage(number):
    """The text of a document; of different lengths, so that batches are padded."""
    return texts.load("continuation")[700 * number :][: 200 + 30 * number]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny model and its tokenizer."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([texts.load("calibration")[:20_000]], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    ).save_pretrained(folder)
    build("Llama", vocab_size=512, max_position_embeddings=1024).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(tiny):
    return models.load(str(tiny), dtype=torch.float32)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with the tasks and their data."""
    folder, lines = tmp_path_factory.mktemp("tasks"), []
    for number in range(DOCUMENTS):
        text = passage(number)
        shown = {"text": text, "context": text[:-30], "question": text[: 60 + 9 * number]}
        lines.append(json.dumps({**shown, "choices": [text[-30:], " no"], "gold": number % 2}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    for name, body in TASKS.items():
        own = "\n".join(line.strip() for line in body.strip().splitlines())
        files = f"{{test: {folder / 'data.jsonl'}}}"
        data = f"dataset_kwargs: {{data_files: {files}, cache_dir: {folder / 'cache'}}}"
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\n{data}\ntest_split: test\n{own}\n"
        )
    return folder


@pytest.fixture(scope="module")
def manager(tasks):
    return TaskManager(include_path=str(tasks), include_defaults=False)


@pytest.fixture
def run(loaded, manager):
    """Run tasks under a policy; returns lm-eval's results."""
    model, tokenizer = loaded

    def evaluate(*names, select_always=False, log_samples=True, **more):
        given = {"policy": EXACT, "max_length": WINDOW, **more}
        with LokiLM(model, tokenizer=tokenizer, **given) as lm:
            lm.attachment.always_select = select_always
            return lm_eval.simple_evaluate(
                model=lm,
                tasks=list(names),
                task_manager=manager,
                bootstrap_iters=0,
                log_samples=log_samples,
            )

    return evaluate


def answers(results, task):
    """The model's answers to each document of a task."""
    return [sample["resps"] for sample in results["samples"][task]]


def likelihoods(results, task):
    """The log-likelihoods that the model gave, of every document and choice."""
    found = list(numbers_in(answers(results, task)))
    assert len(found) >= DOCUMENTS
    return found


def numbers_in(value):
    if isinstance(value, list | tuple):
        for part in value:
            yield from numbers_in(part)
    elif not isinstance(value, bool):
        yield float(value)


def traffic(results, task):
    return next(iter(results["config"]["loki_attn"]["traffic"][task].values()))


def same(ours, theirs):
    return ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("mode", ["decode", "every_query"])
def test_a_full_budget_that_selects_gives_what_dense_gives(run, mode):
    names = (ROLLING, CHOICE, ANSWER)
    dense = run(*names, policy="dense", mode=mode)
    full = run(*names, policy=ALL, mode=mode, select_always=True)
    for name in (ROLLING, CHOICE):
        assert same(likelihoods(full, name), likelihoods(dense, name))
    assert answers(full, ANSWER) == answers(dense, ANSWER)
    for name in names:
        counted = traffic(full, name)
        assert counted["sparse_calls"] + counted["every_query_calls"] > 0
        assert traffic(dense, name)["sparse_calls"] == 0


def test_dense_is_what_lm_eval_scores_without_us(run, loaded, manager):
    from lm_eval.models.huggingface import HFLM

    names = [ROLLING, CHOICE, LETTER, ANSWER]
    stock = HFLM(pretrained=loaded[0], tokenizer=loaded[1], max_length=WINDOW)
    theirs = lm_eval.simple_evaluate(
        model=stock, tasks=names, task_manager=manager, bootstrap_iters=0
    )
    ours = run(*names, policy="dense")
    for name in names[:3]:
        assert same(likelihoods(ours, name), likelihoods(theirs, name))
    assert answers(ours, ANSWER) == answers(theirs, ANSWER)


def test_forcing_every_token_is_every_query_selecting(run):
    """Windows with one token of context only: the two modes then read the same rows."""
    forced = run(ROLLING, max_length=256)
    at_once = run(ROLLING, max_length=256, mode="every_query")
    dense = run(ROLLING, max_length=256, policy="dense")
    assert same(likelihoods(forced, ROLLING), likelihoods(at_once, ROLLING))
    assert not same(likelihoods(forced, ROLLING), likelihoods(dense, ROLLING))


def test_every_scored_token_is_a_step_of_every_layer(run, loaded):
    counted = traffic(run(CHOICE, ROLLING, LETTER), CHOICE)
    tokenizer, scored = loaded[1], 0
    for number in range(DOCUMENTS):
        text = passage(number)
        context = text[:-30].rstrip()
        space = text[len(context) : -30]
        for choice in (text[-30:], " no"):
            whole = tokenizer(context + space + " " + choice).input_ids
            scored += len(whole) - len(tokenizer(context).input_ids)
    assert counted["sparse_calls"] == LAYERS * scored
    assert counted["every_query_calls"] == counted["dense_calls"] == 0
    assert counted["read_bytes"] < counted["dense_bytes"]


def test_generation_selects_in_every_step_after_the_first_token(run):
    decode = traffic(run(ANSWER), ANSWER)
    assert decode["sparse_calls"] == DOCUMENTS * LAYERS * 7
    assert decode["every_query_calls"] == 0
    both = traffic(run(ANSWER, mode="every_query"), ANSWER)
    assert both["sparse_calls"] == DOCUMENTS * LAYERS * 7
    assert both["every_query_calls"] == DOCUMENTS * LAYERS


@pytest.mark.parametrize("mode", ["decode", "every_query"])
def test_padding_changes_nothing(run, mode):
    names = (ROLLING, CHOICE, ANSWER)
    alone, padded = (run(*names, mode=mode, batch_size=size) for size in (1, 3))
    for name in (ROLLING, CHOICE):
        assert same(likelihoods(padded, name), likelihoods(alone, name))
    assert answers(padded, ANSWER) == answers(alone, ANSWER)


def test_choices_of_one_token_share_their_step(run):
    shared, apart = (run(LETTER, logits_cache=kept) for kept in (True, False))
    assert same(likelihoods(shared, LETTER), likelihoods(apart, LETTER))
    assert traffic(shared, LETTER)["sparse_calls"] == DOCUMENTS * LAYERS
    assert traffic(apart, LETTER)["sparse_calls"] == DOCUMENTS * LAYERS * 3


def test_equal_windows_share_the_steps_of_the_longest_continuation(loaded):
    model, tokenizer = loaded
    ids = tokenizer(passage(0)).input_ids[:40]
    long, short = (("", "l"), ids[:30], ids[30:]), (("", "s"), ids[:37], ids[37:])
    for requests in ([long, short], [short, long]):
        with LokiLM(model, tokenizer=tokenizer, policy=EXACT) as lm:
            both = lm._loglikelihood_tokens(requests, disable_tqdm=True)
            assert lm.attachment.traffic.sparse_calls == 10 * LAYERS
            alone = lm._loglikelihood_tokens([long], disable_tqdm=True)
        assert both[requests.index(long)] == pytest.approx(alone[0])
        assert both[requests.index(long)][0] < both[requests.index(short)][0] < 0


def test_a_prefix_is_read_densely_and_scored(run):
    dense = run(ROLLING, policy="dense", prefix_tokens=40)
    assert same(likelihoods(dense, ROLLING), likelihoods(run(ROLLING, policy="dense"), ROLLING))
    calls = [traffic(run(ROLLING, prefix_tokens=n), ROLLING)["sparse_calls"] for n in (0, 40)]
    assert 0 < calls[1] < calls[0]
    with pytest.raises(LokiAttnError, match="never selected"):
        run(ROLLING, prefix_tokens=WINDOW)


@pytest.mark.parametrize("task", [ROLLING, CHOICE, ANSWER])
@pytest.mark.parametrize("mode", ["decode", "every_query"])
def test_an_idle_policy_has_no_score(run, task, mode):
    idle = Policy(select=METHODS["exact_topk"], budget=Budget(top_k=1000), name="wide")
    with pytest.raises(LokiAttnError, match=f"wide never selected anything in task '{task}'"):
        run(task, policy=idle, mode=mode)


def test_one_idle_task_is_refused_beside_one_that_selects(run):
    """Selecting in one task must not vouch for another."""
    some = Policy(select=METHODS["exact_topk"], budget=Budget(top_k=80), name="some")
    with pytest.raises(LokiAttnError, match=f"task '{ANSWER}'"):
        run(ROLLING, ANSWER, policy=some)


def test_it_lets_go_of_the_model(loaded):
    model, tokenizer = loaded
    before = model.config._attn_implementation
    with LokiLM(model, tokenizer=tokenizer, policy=EXACT):
        assert model.config._attn_implementation != before
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"topk": 8}, UnknownNameError, "argument of loki-attn 'topk'. Did you mean 'top_k'?"),
        ({"policy": "lokki"}, UnknownNameError, "policy 'lokki'. Did you mean 'loki'?"),
        ({"policy": "dense", "rank": 8}, UnknownNameError, "policy field 'rank'"),
        ({"policy": EXACT, "top_k": 8}, PolicyError, "takes overrides"),
        ({"policy": "exact-topk", "mode": "all"}, UnknownNameError, "mode 'all'"),
        ({"policy": "exact-topk", "batch_size": "auto:4"}, InputError, "give a number"),
        ({"policy": "exact-topk", "prefix_tokens": -1}, InputError, "prefix_tokens must be"),
        ({"policy": "loki"}, BasisError, "loki-attn calibrate --model "),
        ({"policy": "loki-paper"}, BasisError, "--kind pca"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(
    options, error, says, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(error) as refused:
        LokiLM(str(tmp_path / "no-such-model"), **options)
    assert says in str(refused.value)


def test_the_cache_of_responses_is_refused(loaded, manager, tmp_path):
    model, tokenizer = loaded
    with (
        LokiLM(model, tokenizer=tokenizer, policy=EXACT) as lm,
        pytest.raises(InputError, match="drop use_cache"),
    ):
        lm_eval.simple_evaluate(
            model=lm, tasks=[ANSWER], task_manager=manager, use_cache=str(tmp_path / "kept")
        )


@pytest.mark.parametrize("cached", [True, False])
def test_a_basis_is_the_given_one_or_the_cached_one(loaded, tiny, tmp_path, monkeypatch, cached):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = models.basis_path(str(tiny), "mixed") if cached else tmp_path / "mine.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    random_basis(loaded[0]).save(path)
    given = {} if cached else {"basis": str(path)}
    with LokiLM(str(tiny), policy="loki", top_k=16, dense_layers=[0], **given) as lm:
        record = lm.record()
    assert record["basis"]["kind"] == "random"
    assert record["contender"] == "loki:top_k=16,dense_layers=[0]"
    assert record["policy"]["budget"]["dense_layers"] == [0]
    assert record["model"]["id"] == "tiny"
    json.dumps(record)


@pytest.mark.parametrize("log_samples", [True, False])
def test_rows_have_intervals_counts_and_an_origin(run, log_samples):
    results = run(CHOICE, ROLLING, log_samples=True)
    if not log_samples:
        del results["samples"]
        results["results"][CHOICE]["acc_stderr,none"] = 0.1
        results["results"][ROLLING]["bits_per_byte_stderr,none"] = 0.1
    made = rows(results)
    by_task = {row["task"].removeprefix("lm-eval:"): row for row in made}
    choice, rolling = by_task[CHOICE], by_task[ROLLING]
    for row, metric in ((choice, "acc"), (rolling, "bits_per_byte")):
        found = row["metrics"]
        assert found[metric] == results["results"][row["task"].partition(":")[2]][f"{metric},none"]
        assert found[f"{metric}_low"] < found[metric] < found[f"{metric}_high"]
        assert found["selecting_calls"] > 0
        assert 0 < found["read_bytes_share"] < 1
        assert (row["n"], row["contender"]) == (DOCUMENTS, "custom")
    left = {True: None, False: ["acc_norm"]}[log_samples]
    assert choice["metrics"].get("without_interval") == left
    assert ("word_perplexity" in rolling["metrics"]) == log_samples
    assert "single-token step" in rolling["protocol"]
    assert (rolling["settings"]["mode"], rolling["settings"]["prefix_tokens"]) == ("decode", 0)
    assert choice["provenance"]["versions"]["lm_eval"]
    assert len(sections(json.loads(json.dumps(made)))) == 2


def test_what_has_no_interval_has_no_row(run):
    results = run(ROLLING)
    del results["samples"]
    with pytest.raises(InputError, match="no metric with an interval, got bits_per_byte, word_per"):
        rows(results)


def test_a_length_of_ruler_counts_its_own_documents():
    """Lm-eval scores a document -1 at the length 4096 when it has another."""
    record = {key: {} for key in ("model", "contender", "policy", "basis", "provenance")}
    counts = {"sparse_calls": 5, "every_query_calls": 0, "dense_bytes": 0}
    record |= {"mode": "decode", "prefix_tokens": 0, "max_length": 1, "batch_size": 1}
    record["traffic"] = {"niah": {"generate_until": counts}}
    scores = [{"4096": 1.0}, {"4096": 0.0}, {"4096": -1.0, "8192": 1.0}]
    made = rows(
        {
            "config": {"loki_attn": record},
            "results": {"niah": {"4096,none": 0.5, "8192,none": 1.0, "16384,none": -1}},
            "n-samples": {"niah": {"effective": 3}},
            "samples": {"niah": [{"filter": "none", **one} for one in scores]},
        }
    )
    found = [(r["settings"]["length_tokens"], r["metrics"]["recall"], r["n"]) for r in made]
    assert found == [(4096, 0.5, 2), (8192, 1.0, 1)]
    assert made[0]["metrics"]["recall_low"] < 0.2
    assert made[1]["metrics"]["recall_low"] > 0.2


def test_results_of_another_model_are_refused():
    with pytest.raises(InputError, match="--model loki-attn"):
        rows({"config": {"model": "hf"}, "results": {}})


def test_an_interval_comes_from_samples_that_reproduce_the_value():
    hits = [True, True, False, False]
    assert score(0.5, 0.1, hits, 9).n == 4
    low, high = score(0.5, 0.1, hits, 9).interval
    assert (low, high) == pytest.approx((0.15, 0.85), abs=0.01)
    # A maximum, say: neither mean nor perplexity.
    low, high = score(0.9, 0.1, hits, 9).interval
    assert (low, high) == pytest.approx((0.704, 1.096), abs=1e-3)
    assert score(0.9, "N/A", hits, 9).interval is None
    assert score(0.9, "N/A", [["a"], ["b"]], 9).interval is None
    assert score(2.5, "N/A", [2.5], 9).interval is None


def test_a_perplexity_gets_the_interval_of_its_ratio():
    pairs = [(-20.0, 10), (-45.0, 20), (-31.0, 16), (-66.0, 30)]
    mean = sum(a for a, _ in pairs) / sum(b for _, b in pairs)
    ends = score(-mean / math.log(2), "N/A", pairs, 9).interval
    exponents = score(math.exp(-mean), "N/A", pairs, 9).interval
    assert ends[0] < -mean / math.log(2) < ends[1]
    assert exponents == pytest.approx([2**end for end in ends])
    # The mean of each document, the least and the largest, bound it.
    assert ends[0] * math.log(2) >= 31 / 16
    assert ends[1] * math.log(2) <= 45 / 20


@pytest.fixture
def command(tasks, tmp_path, monkeypatch):
    """Run the command line in this process, knowing the tiny tasks only."""
    import functools

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False)
    )
    return lambda *words: door.run([str(word) for word in words])


def test_the_command_line_runs_writes_and_makes_the_same_rows(
    command, run, tiny, tasks, tmp_path, capsys
):
    model = f"pretrained={tiny},policy=exact-topk,top_k=6,sinks=1,recents=2,max_length={WINDOW}"
    words = ["run", "--model_args", f"{model},dtype=float32", "--tasks", f"{CHOICE},{ANSWER}"]
    more = ["--include_path", tasks, "--output_path", tmp_path / "out", "--log_samples"]
    assert command(*words, *more) == 0
    assert sys.argv[0] != "lm-eval"
    capsys.readouterr()

    assert command("rows", tmp_path / "out") == 0
    made = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    policy = {"policy": "exact-topk", "top_k": 6, "sinks": 1, "recents": 2}
    live = rows(run(CHOICE, ANSWER, **policy))
    assert [row["task"] for row in made] == [f"lm-eval:{CHOICE}", f"lm-eval:{ANSWER}"]
    for ours, theirs in zip(made, live, strict=True):
        for key in ("task", "protocol", "contender", "policy", "metrics", "settings", "n"):
            assert ours[key] == json.loads(json.dumps(theirs[key])), key


def test_the_command_line_says_what_it_refuses(command, tiny, tasks, capsys):
    words = ["--model", "loki-attn", "--tasks", ANSWER, "--include_path", tasks]
    idle = f"pretrained={tiny},policy=exact-topk,max_length={WINDOW}"
    assert command(*words, "--model_args", idle) == 2
    assert "error: exact-topk never selected anything in task" in capsys.readouterr().err
    assert command("rows") == 2
    assert "error: rows needs what was given as --output_path" in capsys.readouterr().err
    assert command("rows", "nowhere") == 2
    assert "error: There are no results of lm-eval at 'nowhere'" in capsys.readouterr().err


def test_short_model_names_stand_for_folders(monkeypatch):
    seen, commands = [], "loki_attn.integrations.lm_eval.commands"
    monkeypatch.setattr(f"{commands}.resolve", lambda name: f"/m/{name}")
    monkeypatch.setattr(f"{commands}.cli_evaluate", lambda: seen.append(sys.argv[1:]))
    for words in ("run -a pretrained=smollm2-135m,top_k=8", "run -M hf -a pretrained=a/b", "ls"):
        assert door.run(words.split()) == 0
    assert [" ".join(words) for words in seen] == [
        "run -a pretrained=/m/smollm2-135m,top_k=8 --model loki-attn",
        "run -M hf -a pretrained=a/b",
        "ls",
    ]


def test_ruler_runs_through_the_door(tiny, monkeypatch):
    """lm-eval's own generator and task file; only its list of words is cut short."""
    pytest.importorskip("wonderwords")
    nltk = pytest.importorskip("nltk")

    class FewWords:
        _categories = dict.fromkeys(("nouns", "adjectives", "verbs"), ("lake", "hill"))

    monkeypatch.setattr("wonderwords.RandomWord", FewWords)
    monkeypatch.setattr(nltk, "download", lambda *_, **__: True)
    known = set(sys.modules)
    ruler = importlib.resources.files(lm_eval) / "tasks" / "ruler"
    # Lengths of its metrics list read -1 where they were not run; 4096 is always among them.
    metadata = {"tokenizer": str(tiny), "max_seq_lengths": [416, 448]}
    manager = TaskManager(include_path=str(ruler), include_defaults=False, metadata=metadata)
    try:
        with LokiLM(str(tiny), policy="exact-topk", top_k=16, max_length=512) as lm:
            results = lm_eval.simple_evaluate(
                model=lm,
                tasks=["niah_single_1"],
                task_manager=manager,
                samples={"niah_single_1": [0, 1, 500, 501, 502]},
                gen_kwargs={"max_gen_toks": 6},
                bootstrap_iters=0,
            )
    finally:
        for name in set(sys.modules) - known:
            if "ruler" in name:
                del sys.modules[name]
    made = rows(results)
    assert [(row["settings"]["length_tokens"], row["n"]) for row in made] == [(416, 2), (448, 3)]
    for row in made:
        assert row["metrics"]["recall_low"] <= row["metrics"]["recall"]
        assert row["metrics"]["selecting_calls"] == 5 * LAYERS * 5


def test_without_lm_eval_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "loki_attn.integrations.lm_eval")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'loki-attn\[lm-eval\]'"):
        importlib.import_module("loki_attn.integrations.lm_eval")


def test_results_are_read_oldest_first(tmp_path):
    for day in ("02", "01"):
        stamp = f"2026-01-{day}T10-00-00.5"
        (tmp_path / f"results_{stamp}.json").write_text(json.dumps({"configs": {"a": 1}, "x": day}))
        (tmp_path / f"samples_a_{stamp}.jsonl").write_text('{"acc": 1}\n')
    (tmp_path / "notes.json").write_text("[]")
    read = list(read_results(tmp_path))
    assert [results["x"] for results in read] == ["01", "02"]
    assert read[0]["samples"] == {"a": [{"acc": 1}]}
