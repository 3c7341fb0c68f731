"""gRPC edges: they convert, map errors to statuses and decide nothing."""
