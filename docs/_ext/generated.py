"""Parts of pages that are written at build time, from what the library says of itself.

A line `<!-- generated: NAME -->` in a page is replaced by Markdown before the page is read, so that
a new method, policy, option or public name appears without anybody editing a list.
"""

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

import loki_attn
from loki_attn.cli.methods import introduction, needs_of
from loki_attn.policy import ROOMS, methods, preset, presets

_VERBS: Final = {
    "select": "Select: what a query reads",
    "evict": "Evict: what is kept",
    "allocate": "Allocate: how what is kept is shared out",
}
_PLACE: Final = re.compile(r"^<!-- generated: ([a-z-]+) -->$", re.MULTILINE)
# Code stays as it is; outside of it, these would be markup.
_MARKUP: Final = re.compile(r"(`[^`]*`)|([*_|<\[])")


def setup(app: Sphinx) -> dict[str, Any]:
    """Fill the places of every page when it is read."""
    app.connect("source-read", _fill)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def method_list() -> str:
    """Every method of every verb, as its file introduces itself."""
    return "\n".join(f"## {title}\n\n{_methods_of(verb)}" for verb, title in _VERBS.items())


def _methods_of(verb: str) -> str:
    parts = []
    for name, method in methods(verb).items():
        told = import_module(method.__module__).__doc__ or ""
        about = introduction(told.partition("\n")[2])  # its first line is a title
        fields = "\n".join(f"{k}\n: {_plain(v)}\n" for k, v in about.items())
        place = f"{{py:class}}`{method.__module__}.{method.__name__}`"
        summary = _plain((inspect.getdoc(method) or "").splitlines()[0])
        parts.append(
            f"### `{name}`\n\n{summary} Specification: {place}.\n\n{fields}\nNeeds\n"
            f": {needs_of(method)}\n"
        )
    return "\n".join(parts)


def method_modules() -> str:
    """The reference of every method's module."""
    found = dict.fromkeys(m.__module__ for verb in ROOMS for m in methods(verb).values())
    return "".join(f"```{{eval-rst}}\n.. automodule:: {name}\n```\n\n" for name in found)


def policy_list() -> str:
    """The presets, as JSON that `Policy.from_json` reads."""
    return "".join(
        f"## `{name}`\n\n```json\n{preset(name).to_json()}\n```\n\n" for name in presets()
    )


def public_names() -> str:
    """What `import loki_attn` offers, with the home of each name."""
    lines = ["| name | in a sentence |", "|---|---|"]
    for name in loki_attn.__all__:
        if name == "__version__":
            lines.append("| `__version__` | The version of the library. |")
            continue
        value = getattr(loki_attn, name)
        role = "class" if inspect.isclass(value) else "func"
        summary = (inspect.getdoc(value) or "").partition("\n\n")[0].replace("\n", " ")
        link = f"{{py:{role}}}`{name} <{_home(value)}>`"
        lines.append(f"| {link} | {_plain(summary)} |")
    return "\n".join(lines)


def result_pages() -> str:
    """A table of contents of the results; pages that share a title go by their file's name."""
    folder = Path(__file__).parent.parent / "results"
    found = {page.stem: _title(page) for page in sorted(folder.glob("*.md"))}
    names = sorted(found, key=lambda stem: (stem != "README", stem))
    shared = Counter(found.values())
    lines = [
        f"{stem if shared[found[stem]] > 1 else found[stem]} <results/{stem}>" for stem in names
    ]
    return "\n".join(["```{toctree}", ":hidden:", ":caption: Results", "", *lines, "```"])


def _title(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    return next((line[2:] for line in text.splitlines() if line.startswith("# ")), page.stem)


def commands() -> str:
    """Every command with its options, from the command line itself."""
    from typer.main import get_command

    from loki_attn.cli.app import app

    return "\n".join(_command("loki-attn", get_command(app)))


def _command(path: str, command: Any) -> Iterator[str]:
    yield f"## `{path}`\n\n{_plain(inspect.cleandoc(command.help or ''))}\n"
    inner = getattr(command, "commands", {})
    if command.epilog:
        yield f"```sh\n{command.epilog.removeprefix('Example: ')}\n```\n"
    if inner:
        yield "Commands: " + ", ".join(f"`{name}`" for name in inner) + ".\n"
    rows = [_parameter(one) for one in command.params if not getattr(one, "hidden", False)]
    if rows:
        yield "\n".join(["| option | meaning | default |", "|---|---|---|", *rows, ""])
    for name, one in inner.items():
        yield from _command(f"{path} {name}", one)


def _parameter(one: Any) -> str:
    if one.param_type_name == "argument":
        names = f"`{one.metavar or one.name.upper()}`"
    else:
        names = ", ".join(f"`{name}`" for name in (*one.opts, *one.secondary_opts))
    help_text = getattr(one, "help", None) or ""
    given = one.default
    silent = given is None or given is False or callable(given) or given == ()
    # Of a pair such as --resume and --no-resume, the one that is on.
    shown = one.opts[0] if given is True else given
    default = "required" if one.required else "" if silent else f"`{shown}`"
    return f"| {names} | {_plain(help_text)} | {default} |"


def _home(value: Any) -> str:
    """Where the reference documents a public name: attach and calibrate in their package."""
    module: str = value.__module__
    if module.startswith("loki_attn.integrations.transformers."):
        module = "loki_attn.integrations.transformers"
    return f"{module}.{value.__qualname__}"


def _plain(text: str) -> str:
    return _MARKUP.sub(lambda m: m[1] or f"\\{m[2]}", text)


PARTS: Final[dict[str, Callable[[], str]]] = {
    "commands": commands,
    "method-list": method_list,
    "method-modules": method_modules,
    "policy-list": policy_list,
    "public-names": public_names,
    "result-pages": result_pages,
}


def _fill(app: Sphinx, page: str, source: list[str]) -> None:
    del app

    def part(place: re.Match[str]) -> str:
        if place[1] not in PARTS:
            raise ExtensionError(f"{page}: no part is named {place[1]!r}; there are {list(PARTS)}.")
        return PARTS[place[1]]()

    source[0] = _PLACE.sub(part, source[0])
