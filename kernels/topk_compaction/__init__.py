"""Choose the most attended image tokens of each layer, gather their keys and values."""
