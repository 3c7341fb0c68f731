"""The decision server: edges, data plane, model replicas, audit and control."""
