"""Tasks that judge an encoder by frozen features: what they are, and how features are scored."""
