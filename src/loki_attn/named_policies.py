"""Named policies of no single file, as plain records; methods' files bring their own `PRESETS`."""

from typing import Any, Final

PRESETS: Final[dict[str, dict[str, Any]]] = {
    "dense": {"select": {"method": "dense"}},
    "exact-topk": {
        "select": {"method": "exact_topk"},
        "budget": {"top_k": 512, "sinks": 4, "recents": 64, "min_k": 128},
    },
    "loki": {
        "select": {"method": "loki", "layout": "planes", "plane_dtype": "int8"},
        # Up to three times top_k, dense attention is as fast (docs/results/README.md).
        "budget": {"top_k": 512, "sinks": 4, "recents": 64, "min_k": 128, "dense_below": 1536},
    },
    "loki-paper": {
        "select": {"method": "loki", "layout": "rotated", "rank": 0.25},
        "budget": {"fraction": 0.25},
        "group_reduce": "none",
    },
    "streaming-llm": {
        "select": {"method": "streaming_llm"},
        "budget": {"top_k": 512, "sinks": 4},
    },
}
