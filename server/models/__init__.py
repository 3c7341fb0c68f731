"""Model versions: where they are kept, what they are called, and how a model server gets them."""
