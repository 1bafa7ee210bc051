"""The relational engine: objectives over the edges between tokens."""
