"""Engines, schedules and the expression printer."""
