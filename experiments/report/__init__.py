"""Turns records into tables, figures and one page. Reads ``results/`` and needs no torch."""
