"""The durable write side of the audit: a decision is answered only when its row is here."""
