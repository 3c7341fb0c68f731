"""Adapters from an exchange's own messages to `pretrade.market.v1` events, one a file."""
