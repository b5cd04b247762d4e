"""Compares many recipes and seeds on one benchmark, side by side; `report/` writes the page."""
