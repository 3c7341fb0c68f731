"""JSON over HTTP: what answers it, on both edges alike."""
