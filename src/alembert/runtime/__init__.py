"""Adaptive inference: policies, batching, backends, and the classifier that joins them."""
