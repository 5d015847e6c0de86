"""Golden vectors: inputs, expected outputs and bounds that a port in any language reads."""
