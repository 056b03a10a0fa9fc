"""A trained model, or saved features, in use: features, search, indexes, export."""
