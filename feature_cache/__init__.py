"""Market data in, feature vectors out: feeds, order books, the feature engine and its store."""
