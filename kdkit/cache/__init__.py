"""Teachers that keep their answers on disk."""
