"""The way of an order: read, admit, decide once, record, and note whether the caller received the answer."""
