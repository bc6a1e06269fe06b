"""Encoders run layer by layer, exit heads, where they stand, and the models made of both.

Importing it registers multi-exit models and BiLSTM students with transformers' Auto classes.
"""

# First, so that no module of this package is half executed when transformers' Auto classes come in.
import transformers.models.auto.modeling_auto  # noqa: F401

from alembert.models import bilstm, multi_exit  # noqa: F401
