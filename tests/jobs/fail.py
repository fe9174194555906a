"""A rank that fails: ``fail.py FOLDER``."""

raise SystemExit("fails on purpose")
