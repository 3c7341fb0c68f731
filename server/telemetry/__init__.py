"""Metrics, traces and logs of decisions, for people and their tools."""
