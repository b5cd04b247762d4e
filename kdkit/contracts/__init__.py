"""What a plugin author implements and receives."""
