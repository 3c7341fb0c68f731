"""Datasets, training and export of the models, and the handler TorchServe runs."""
