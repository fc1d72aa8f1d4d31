"""Factories of rows, at hand in every test of the page."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
