"""Stages and objectives on transformers' Trainer; run directories that resume."""
