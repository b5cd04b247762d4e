"""Runs a recipe in a folder, and checks beforehand what it would do."""
