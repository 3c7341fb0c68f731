"""The way of an order: read, admit, decide once, record, and know whether its caller heard the answer."""
