"""One door per framework; each imports its framework and nothing else does."""
