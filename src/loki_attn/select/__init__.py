"""Select: what does this query read? Nothing is lost. One file per method, found by its name."""
