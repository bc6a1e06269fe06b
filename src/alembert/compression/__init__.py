"""Many distillations in one command: hyper-parameter search and ablations."""
