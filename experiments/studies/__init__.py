"""Experiments other than training runs: the paper's claims, checked on small problems.

Each module holds one study: `Settings`, its configuration with defaults, and `run`, which returns
its measurements as plain numbers. `python -m experiments.studies` runs them.
"""
