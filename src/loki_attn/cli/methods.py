"""`loki-attn methods`: what there is to choose from."""

from typing import Any, Final

from loki_attn.cli import options, terminal

NAME: Final = "methods"
EXAMPLE: Final = "Example: loki-attn methods --json"

_FIELDS: Final = {
    "Paper": "paper",
    "arXiv": "arxiv",
    "What it does": "what",
    "Bytes read per decode step": "bytes_read",
}


def command(as_json: options.Json = False) -> None:
    """List the methods and the policies that come with the library."""
    methods, presets = _methods(), _presets()
    if as_json:
        terminal.emit({"methods": methods, "presets": presets})
        return
    terminal.table(
        "Methods",
        ["method", "verb", "basis", "paper", "arXiv", "bytes read per decode step"],
        [
            [
                m["method"],
                m["verb"],
                "needed" if m["needs_basis"] else "-",
                m["paper"],
                m["arxiv"],
                m["bytes_read"],
            ]
            for m in methods
        ],
        left=True,
    )
    terminal.table(
        "Policies (--policy NAME, changed like loki:top_k=256,rank=16)",
        ["policy", "method", "budget", "choice in a group"],
        [
            [
                p["policy"],
                p["method"],
                ", ".join(f"{k}={v}" for k, v in p["budget"].items()) or "everything",
                p["group_reduce"],
            ]
            for p in presets
        ],
        left=True,
    )


def _methods() -> list[dict[str, Any]]:
    from importlib import import_module

    from loki_attn.policy import methods

    found = []
    for name, method in methods().items():
        about = introduction(import_module(method.__module__).__doc__ or "")
        verb = method.__module__.split(".")[-2]
        known = {short: about.get(field, "").rstrip(".") for field, short in _FIELDS.items()}
        found.append({"method": name, "verb": verb, "needs_basis": method.needs_basis, **known})
    return found


def _presets() -> list[dict[str, Any]]:
    from loki_attn.policy import preset, presets

    return [
        {
            "policy": name,
            "method": policy.select.method,
            "budget": policy.budget.to_json(),
            "group_reduce": policy.group_reduce,
        }
        for name, policy in ((name, preset(name)) for name in presets())
    ]


def introduction(docstring: str) -> dict[str, str]:
    """Read the fields with which a method's file introduces itself.

    Args:
        docstring: The module's; a field is `Name: text` and goes on in indented lines.

    Returns:
        The fields' texts, each on one line.
    """
    fields: dict[str, str] = {}
    current = ""
    for line in docstring.splitlines():
        name, colon, text = line.partition(": ")
        if line.startswith("    ") and current:
            fields[current] += " " + line.strip()
        elif colon:
            current, fields[name] = name, text.strip()
        else:
            current = ""
    return fields
