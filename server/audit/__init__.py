"""The durable journal and its way into SQL."""
