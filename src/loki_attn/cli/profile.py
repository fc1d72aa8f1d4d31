"""`loki-attn profile`: from text to what a method must learn of a model."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from loki_attn.cli import options, terminal
from loki_attn.cli.calibrate import writable
from loki_attn.cli.loading import load_model, load_text
from loki_attn.errors import InputError

if TYPE_CHECKING:
    from loki_attn.profile import Profile

NAME: Final = "profile"
_BY_GRADIENT: Final = "duo_attention"
EXAMPLE: Final = "Example: loki-attn profile --model smollm2-135m --method hata --text novel.txt"


def command(
    method: Annotated[str, typer.Option(help="The method that learns, hata say.")],
    model: options.Model = options.DEFAULT_MODEL,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text file; without it, a packaged text.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text to use.")] = 24_576,
    window: Annotated[int, typer.Option(min=2, help="Tokens per forward pass.")] = 2048,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the method, like bits=64. Repeat it for more."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The profile file; without it, one in the cache, where others look."),
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(help="A profile file of other methods, which this one is added to."),
    ] = None,
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
) -> None:
    """Let a method learn from a text what it needs of a model: hash weights, channels, gates.

    Ctrl-C leaves files as they were.
    """
    began = time.monotonic()
    if out is not None and into is not None:
        raise InputError("--into names the file already; drop --out, or drop --into.")
    from loki_attn.calibrating import calibrator
    from loki_attn.models.profiles import profile_path
    from loki_attn.profile import Profile

    chosen = _read_settings(settings or ())
    # A refused setting must not cost the minutes of a run.
    if method == _BY_GRADIENT:
        from loki_attn.integrations.transformers.gates import gate_settings

        gate_settings(**chosen)
    else:
        calibrator(method, **chosen)
    place = writable(into or out or profile_path(model, method))
    held = Profile.load(into) if into is not None and into.exists() else None
    made = _learn(model, method, text, dtype, tokens, window, chosen, held)
    made = made if held is None else held.merged(made)
    made.save(place)
    _show(made, method, place, time.monotonic() - began, as_json=as_json)


def _learn(
    model: str,
    method: str,
    text: Path | None,
    dtype: str,
    tokens: int,
    window: int,
    settings: dict[str, Any],
    held: "Profile | None",
) -> "Profile":
    """Run the model over the text and let the method learn."""
    from loki_attn.texts import digest

    corpus, content = load_text(text, "calibration")
    loaded, tokenizer = load_model(model, dtype)
    from loki_attn.integrations.transformers.identity import identity
    from loki_attn.integrations.transformers.profiling import collect_profile

    if held is not None:
        held.check_model(identity(loaded))
    if method == _BY_GRADIENT:
        return _learn_gates(loaded, tokenizer, content, corpus, settings)
    read = tokenizer(content, return_tensors="pt", add_special_tokens=False, verbose=False)
    ids = read.input_ids[0][:tokens]
    total = max(window, ids.numel() // window * window)
    with terminal.progress(f"profiling {model}", total, "tokens") as advance:

        def count(done: int, total: int) -> None:
            learning = f"; {method} learns from them" if done == total else ""
            advance(done, f"{done:,} of {total:,} tokens{learning}")

        return collect_profile(
            loaded,
            method,
            ids,
            window_tokens=window,
            corpus={"name": corpus, "sha256": digest(content)},
            progress=count,
            **settings,
        )


def _learn_gates(
    model: Any, tokenizer: Any, content: str, corpus: str, settings: dict[str, Any]
) -> "Profile":
    """Learn DuoAttention's gates: the text is filler between passkeys, the steps are a setting."""
    from loki_attn.integrations.transformers.gates import gate_settings, optimise_gates

    steps = gate_settings(**settings).steps
    with terminal.progress("learning gates", steps, "steps") as advance:
        return optimise_gates(
            model,
            tokenizer,
            content,
            corpus=corpus,
            progress=lambda done, total: advance(done, f"{done:,} of {total:,} steps"),
            **settings,
        )


def _read_settings(given: Sequence[str]) -> dict[str, Any]:
    """Settings as they are typed, name=value, values as JSON where they are."""
    found: dict[str, Any] = {}
    for setting in given:
        name, equals, value = setting.partition("=")
        if not (name and equals and value):
            raise InputError(f"Cannot read --set {setting!r}; write it like --set bits=64.")
        try:
            found[name.strip().replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            found[name.strip().replace("-", "_")] = value
    return found


def _show(made: "Profile", method: str, out: Path, took_s: float, *, as_json: bool) -> None:
    about = made.provenance["methods"]
    known = about[method] if isinstance(about, dict) else None
    if not isinstance(known, dict):
        raise InputError(f"The profile says nothing of {method!r}.")
    if as_json:
        terminal.emit(
            {
                "profile": str(out),
                "method": method,
                "methods": list(made.methods),
                "settings": known["settings"],
                "layers": len(made.layers),
                "tensors": {n: list(t.shape) for n, t in next(iter(made.layers.values())).items()},
                "tokens": known["tokens"],
                "seconds": took_s,
            }
        )
        return
    terminal.say(
        f"profile of {len(made.layers)} layers for {', '.join(made.methods)}; {method} learnt from "
        f"{known['tokens']:,} tokens in {took_s:.0f} s"
    )
    terminal.write(f"{out}\n")
