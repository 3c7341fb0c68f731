"""The Envoy edge: Envoy speaks HTTP/2 with the callers, and the application runs inside its process."""
