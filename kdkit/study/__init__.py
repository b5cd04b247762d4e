"""Studies: many recipes on one benchmark."""
