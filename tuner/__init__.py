"""Searches the knobs of a plan with Optuna, and asks what would help."""
