"""Adapters onto a model and off again: configuration, matching, plan, report and merge."""
