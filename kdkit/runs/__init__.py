"""Carries a recipe out in a folder, and checks before what it would do."""
