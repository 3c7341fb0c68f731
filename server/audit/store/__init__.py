"""The audit database: its tables, and everything that writes them."""
