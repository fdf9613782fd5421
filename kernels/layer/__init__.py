"""What stands around the attention in a fusion layer: projections and norms."""
