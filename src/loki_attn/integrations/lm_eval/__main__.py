"""`python -m loki_attn.integrations.lm_eval`: lm-eval's own command line, with our model in it."""

import sys

from loki_attn.integrations.lm_eval.commands import run

sys.exit(run(sys.argv[1:]))
