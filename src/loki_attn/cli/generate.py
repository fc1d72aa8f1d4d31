"""`loki-attn generate`: stream text from a model that attends by a policy."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from loki_attn.cli import options, terminal
from loki_attn.cli.loading import find_calibrated, label, load_model, parse_policy
from loki_attn.errors import InputError

if TYPE_CHECKING:
    from loki_attn.integrations.transformers.streaming import Generation

NAME: Final = "generate"
EXAMPLE: Final = "Example: loki-attn generate --file novel.txt --top-k 512 --compare-dense"


def command(
    model: options.Model = options.DEFAULT_MODEL,
    policy: Annotated[
        str, typer.Option("--policy", "-p", help="A preset or a policy's JSON file.")
    ] = "loki",
    basis: options.BasisFile = None,
    prompt: Annotated[str | None, typer.Option(help="The text to go on from.")] = None,
    file: Annotated[Path | None, typer.Option(help="UTF-8 file with the prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where to stop at the latest.")] = 100,
    top_k: Annotated[int | None, typer.Option(help="Tokens that a step reads.")] = None,
    rank: Annotated[int | None, typer.Option(help="Coordinates that rank the tokens.")] = None,
    compare_dense: Annotated[
        bool, typer.Option("--compare-dense", help="Then say it again with dense attention.")
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the model's chat template around the prompt.")
    ] = False,
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
) -> None:
    """Continue a text greedily, streaming, and say what attention read."""
    content = _prompt(prompt, file)
    chosen = parse_policy(policy, top_k=top_k, rank=rank)
    found = find_calibrated(chosen, model, basis)
    loaded, tokenizer = load_model(model, dtype)
    ids = _encode(tokenizer, content, chat=chat)
    room = _room(loaded, ids.shape[1], max_new_tokens)

    from loki_attn.integrations.transformers import attach
    from loki_attn.integrations.transformers.streaming import stream

    write = _silent if as_json else terminal.write
    if compare_dense:
        write(f"--- {label(policy)} ---\n")
    with attach(loaded, chosen.policy, basis=found.basis, profile=found.profile) as attachment:
        sparse = stream(loaded, tokenizer, ids, max_new_tokens=room, write=write)
        traffic = attachment.traffic
    write("\n")
    result: dict[str, Any] = {
        "model": model,
        "policy": label(policy),
        "basis": None if found.basis_path is None else str(found.basis_path),
        **_figures(sparse),
        "read_bytes_share": traffic.read_bytes / traffic.dense_bytes if traffic.dense_bytes else 1,
        "kept_bytes_share": traffic.kept_bytes / traffic.dense_bytes if traffic.dense_bytes else 1,
        "evicted_rows": traffic.evicted_rows,
        "read_bytes_per_token": traffic.read_bytes / max(1, len(sparse.tokens) - 1),
        "selecting_share": traffic.sparse_calls
        / max(1, traffic.sparse_calls + traffic.dense_calls),
    }
    if compare_dense:
        write("\n--- dense ---\n")
        dense = stream(loaded, tokenizer, ids, max_new_tokens=room, write=write)
        write("\n")
        result["dense"] = _figures(dense)
        result["equal_tokens"] = _equal_tokens(sparse, dense)
    if as_json:
        terminal.emit(result)
    else:
        _tell(result)


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise InputError("Give the prompt either as --prompt TEXT or as --file FILE.")
    if file is not None:
        from loki_attn.texts import read_file

        return read_file(file)
    if not (prompt or "").strip():
        raise InputError("The prompt is empty; give some text to go on from.")
    return prompt or ""


def _encode(tokenizer: Any, content: str, *, chat: bool) -> Any:
    """Return the prompt's tokens, int64 [1, n]."""
    if not chat:
        return tokenizer(content, return_tensors="pt", verbose=False).input_ids
    if not tokenizer.chat_template:
        raise InputError("This model's tokenizer has no chat template; drop --chat.")
    turn = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]


def _room(model: Any, prompt_tokens: int, max_new_tokens: int) -> int:
    """Return how many tokens may be generated inside the model's context."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return max_new_tokens
    if prompt_tokens >= limit:
        raise InputError(
            f"The prompt has {prompt_tokens:,} tokens, the model's context is {limit:,}; give a "
            f"prompt of at most {limit - 1:,} tokens."
        )
    room = limit - prompt_tokens
    if room < max_new_tokens:
        terminal.say(f"stopping after {room} tokens, where the model's context of {limit:,} ends")
    return int(min(room, max_new_tokens))


def _figures(said: "Generation") -> dict[str, Any]:
    return {
        "prompt_tokens": said.prompt_tokens,
        "new_tokens": len(said.tokens),
        "text": said.text,
        "first_token_s": said.first_token_s,
        "tokens_per_s": said.tokens_per_s,
    }


def _equal_tokens(one: "Generation", other: "Generation") -> int:
    """How many tokens pass before the two texts part."""
    pairs = zip(one.tokens, other.tokens, strict=False)
    same = 0
    for mine, theirs in pairs:
        if mine != theirs:
            break
        same += 1
    return same


def _tell(result: dict[str, Any]) -> None:
    dense = result.get("dense")
    if result["basis"] is not None:
        terminal.say(f"basis: {result['basis']}")
    terminal.say(f"{result['policy']}: {_speed(result)}")
    if dense is not None:
        terminal.say(f"dense: {_speed(dense)}")
        terminal.say(
            f"the first {result['equal_tokens']} of {result['new_tokens']} tokens are the same"
        )
    if result["evicted_rows"]:
        terminal.say(
            f"{result['evicted_rows']:,} rows were evicted; held in the mean: "
            f"{result['kept_bytes_share']:.1%} of what dense attention holds"
        )
    elif result["selecting_share"] == 0 and result["policy"] != "dense":
        terminal.say("the budget covered the whole context: every step read everything")
        return
    terminal.say(
        f"KV cache: {result['read_bytes_per_token'] / 1e6:.2f} MB read per token, "
        f"{result['read_bytes_share']:.1%} of what dense attention reads"
    )


def _speed(figures: dict[str, Any]) -> str:
    rate = figures["tokens_per_s"]
    return (
        f"{figures['prompt_tokens']:,} tokens read, first token after "
        f"{figures['first_token_s']:.1f} s, then "
        + (f"{rate:.1f} tokens/s" if rate is not None else "no more")
    )


def _silent(text: str) -> None:
    del text
