"""Evaluation: what a policy costs in quality, as rows that name their protocol and origin."""
