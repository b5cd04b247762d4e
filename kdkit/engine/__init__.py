"""Trains one stage: answers, lessons, objective, step; measures by the task's scores."""
