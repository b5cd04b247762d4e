"""Writes a study as one page."""
