"""What eviction methods are composed of: recent queries, group reduction, smoothing, units."""
