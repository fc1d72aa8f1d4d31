"""`loki-attn methods`: what there is to choose from."""

from dataclasses import MISSING, fields
from typing import Any, Final

from loki_attn.cli import options, terminal

NAME: Final = "methods"
EXAMPLE: Final = "Example: loki-attn methods --json"

_FIELDS: Final = {
    "Paper": "paper",
    "arXiv": "arxiv",
    "What it does": "what",
    "Bytes read per decode step": "bytes_read",
    "State per token": "state",
}


def command(as_json: options.Json = False) -> None:
    """List the methods and the policies that come with the library."""
    methods, presets = _methods(), _presets()
    if as_json:
        terminal.emit({"methods": methods, "presets": presets})
        return
    terminal.table(
        "Methods",
        ["verb", "method", "needs", "state per token", "bytes read per decode step", "paper"],
        [
            [
                m["verb"],
                m["method"],
                m["needs"],
                m["state"],
                m["bytes_read"],
                f"{m['paper']} ({m['arxiv']})" if m["arxiv"] not in {"", "-"} else m["paper"],
            ]
            for m in methods
        ],
        left=True,
    )
    terminal.table(
        "Policies (--policy NAME, changed like loki:top_k=256,evict=snapkv,capacity=4096)",
        ["policy", "reads by", "how much", "choice in a group", "keeps by", "how much"],
        [
            [
                p["policy"],
                p["method"],
                _listed(p["budget"]),
                p["group_reduce"],
                p["evict"] if p["allocate"] == "uniform" else f"{p['evict']}, {p['allocate']}",
                _listed(p["keep"]),
            ]
            for p in presets
        ],
        left=True,
    )


def _methods() -> list[dict[str, Any]]:
    from importlib import import_module

    from loki_attn.policy import ROOMS, methods

    found = []
    for verb in ROOMS:
        for name, method in methods(verb).items():
            about = introduction(import_module(method.__module__).__doc__ or "")
            known = {short: about.get(field, "").rstrip(".") for field, short in _FIELDS.items()}
            found.append({"method": name, "verb": verb, "needs": needs_of(method), **known})
    return found


def needs_of(method: Any) -> str:
    """What a method must be given or must see, in words; by default, where it has settings."""
    if all(f.default is not MISSING or f.default_factory is not MISSING for f in fields(method)):
        method = method()
    own = getattr(method, "needs", None)
    needs = [own] if own and own not in {"nothing", "a profile"} else []
    needs += ["a basis"] if getattr(method, "needs_basis", False) else []
    needs += ["a profile"] if getattr(method, "needs_profile", False) else []
    return ", ".join(needs) or "nothing"


def _listed(budget: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in budget.items()) or "everything"


def _presets() -> list[dict[str, Any]]:
    from loki_attn.policy import preset, presets

    return [
        {
            "policy": name,
            "method": policy.select.method,
            "budget": policy.budget.to_json(),
            "group_reduce": policy.group_reduce,
            "evict": policy.evict.method if policy.evicts else "-",
            "keep": policy.keep.to_json(),
            "allocate": policy.allocate.method,
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
