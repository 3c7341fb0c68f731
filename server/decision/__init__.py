"""The way of an order: read, admit, decide once, record, and know whether the caller received the answer."""
