"""Model versions: where they are stored, what they are called, and how a model server loads them."""
