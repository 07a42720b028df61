"""Data that ships with slidetune: models and machines, each figure from a published source."""
