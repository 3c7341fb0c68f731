"""Measurements of one question each: durability, failover, flips, soak, standstills."""
