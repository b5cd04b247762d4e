"""Trains one stage: answers, lessons, objective, step; and measures with the task's scores."""
