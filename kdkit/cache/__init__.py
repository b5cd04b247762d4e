"""Caches of teachers' answers on disk."""
