"""Runs looked at: `python -m ulysses_jax.runs FOLDER...` makes a page of them."""
