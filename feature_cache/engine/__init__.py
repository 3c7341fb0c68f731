"""The feature engine: order books and rolling windows of market events in, feature vectors out. It knows no network."""
