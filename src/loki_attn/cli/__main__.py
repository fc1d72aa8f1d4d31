"""`python -m loki_attn.cli`, the same as `loki-attn`."""

from loki_attn.cli import main

main()
