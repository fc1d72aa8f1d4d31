"""Questions: about a short text, and, for models that can, about a number in a long one."""

from dataclasses import dataclass
from typing import Any, Final, final

import torch
from rich.table import Table
from torch import Tensor

from loki_attn import texts
from loki_attn.demo.continuation import GREEDY
from loki_attn.demo.stage import Stage, dense_contender, note, plain_table, token_bar
from loki_attn.evaluate.protocol import Contender
from loki_attn.evaluate.results import Row
from loki_attn.policy import preset

PROTOCOL: Final = (
    "the text is read densely; every token of the question and of the answer selects for itself; "
    "greedy decoding in the model's chat template; right means that the answer holds the keyword"
)
_CHUNK_TOKENS: Final = 512


@final
@dataclass(frozen=True)
class _Prompt:
    """A quiz in the model's chat template, cut behind the text that is asked about."""

    text: Tensor
    question: Tensor

    @property
    def whole(self) -> Tensor:
        return torch.cat([self.text, self.question], 1)


def ask_short(stage: Stage, loki: Contender) -> None:
    """Ask about the packaged short text, at a budget small enough to matter there."""
    plan = stage.plan
    prompt = _prompt(stage, texts.quiz())
    rows = min(plan.quiz_top_k, prompt.whole.shape[1] // 3)
    small = Contender(
        name=f"loki, {rows} rows",
        policy=preset("loki", top_k=rows, dense_below=0),
        basis=loki.basis,
    )
    stage.console.print(
        f"A story of {prompt.text.shape[1]} tokens. Loki reads {rows} rows of it per KV head, for "
        "every token of the question and of the answer."
    )
    _ask(stage, texts.quiz(), prompt, small, "short story")


def ask_long(stage: Stage, loki: Contender) -> None:
    """Ask for a number hidden in the middle of a long text, at the full budget's rows."""
    if stage.plan.quiz is None:
        note(
            stage.console,
            "No quiz at full length: this model is too small to find a number in thousands of "
            "tokens. Try: loki-attn demo --model qwen2.5-coder-0.5b-instruct",
        )
        return
    # The chat template comes on top.
    quiz = texts.passkey(stage.plan.quiz - 64, lambda text: len(stage.lm.encode(text)))
    prompt = _prompt(stage, quiz)
    stage.console.print(
        f"A number hidden in the middle of {prompt.whole.shape[1]:,} tokens; Loki reads "
        f"{loki.policy.budget.top_k} rows of them."
    )
    _ask(stage, quiz, prompt, loki, "passkey")


def _ask(stage: Stage, quiz: texts.Quiz, prompt: _Prompt, loki: Contender, title: str) -> None:
    lm, console = stage.lm, stage.console
    with token_bar(console, "prefill", prompt.text.shape[1]) as bar:
        prefix = lm.prefill(
            prompt.text,
            reserve_tokens=prompt.question.shape[1] + stage.plan.answer,
            chunk_tokens=_CHUNK_TOKENS,
            progress=bar,
        )
    console.print(f"[bold]{quiz.question}[/bold]", highlight=False)
    rows = []
    table = plain_table("contender", "answer", "right")
    table.columns[1].justify = "left"
    for contender in (dense_contender(), loki):
        row = _answer(stage, quiz, prompt, contender, lm.fork(prefix), title)
        rows.append(row)
        _show(table, row)
    console.print(table)
    stage.keep(rows)
    dense, sparse = ("right" if row.metrics["correct"] else "wrong" for row in rows)
    stage.summary.append((f"question: {title}, {prompt.whole.shape[1]:,} tokens", dense, sparse))
    if dense == "wrong":
        note(console, "Dense attention does not answer it, so this says nothing about Loki.")


def _answer(
    stage: Stage,
    quiz: texts.Quiz,
    prompt: _Prompt,
    contender: Contender,
    cache: Any,
    title: str,
) -> Row:
    lm = stage.lm
    with lm.using(contender.policy, contender.basis, "every_query"):
        made = lm.model.generate(
            input_ids=prompt.whole,
            attention_mask=torch.ones_like(prompt.whole),
            past_key_values=cache,
            max_new_tokens=stage.plan.answer,
            **GREEDY,
        )
        calls = lm.traffic.sparse_calls + lm.traffic.every_query_calls
    ids = made[0, prompt.whole.shape[1] :].tolist()
    answer = " ".join(lm.tokenizer.decode(ids, skip_special_tokens=True).split())
    return stage.row(
        contender,
        task="quiz",
        protocol=PROTOCOL,
        settings={"quiz": title, "question": quiz.question, "tokens": prompt.whole.shape[1]},
        metrics={
            "correct": int(quiz.answered_by(answer)),
            "answer": answer,
            "selecting_calls": calls,
        },
        n=1,
    )


def _show(table: Table, row: Row) -> None:
    right = "yes" if row.metrics["correct"] else "no"
    table.add_row(row.contender, str(row.metrics["answer"]) or "(nothing)", right)


def _prompt(stage: Stage, quiz: texts.Quiz) -> _Prompt:
    tokenizer, text = stage.lm.tokenizer, quiz.prompt
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    else:
        text += "\nAnswer:"
    cut = text.index(quiz.text) + len(quiz.text)
    return _Prompt(*(torch.tensor([stage.lm.encode(p)]) for p in (text[:cut], text[cut:])))
