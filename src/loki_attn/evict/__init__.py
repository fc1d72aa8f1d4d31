"""Eviction methods: what is kept. One file each; rows that go are gone for good."""
