"""Allocation: how an eviction's budget is shared out over layers and heads. One file each."""
