"""Encoders run layer by layer, exit heads, where they stand, and the models made of both."""
