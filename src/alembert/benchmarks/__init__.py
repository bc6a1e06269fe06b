"""Cost and time of a model: MACs, wall clock, and both beside its quality."""
