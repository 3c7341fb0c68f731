"""The durable write side of the audit: a decision is answered when its row is here."""
