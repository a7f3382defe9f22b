"""Measurements and tables about the project. Run from the repository: `python -m bench.NAME`."""
