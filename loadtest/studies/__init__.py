"""Measurements of one question each: failover, flips, soak, standstills."""
