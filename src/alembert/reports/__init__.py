"""Tables and plots of evaluations, made from their results JSON alone."""
