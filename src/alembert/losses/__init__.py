"""Losses as pure functions on tensors: no models, no data, no state."""
