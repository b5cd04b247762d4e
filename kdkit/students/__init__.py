"""What a run leaves: loads it, measures it, exports it, shows it."""
