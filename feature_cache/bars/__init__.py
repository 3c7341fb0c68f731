"""OHLCV bars of each instrument, from trades and from the mid, made from the events that the features are made from."""
