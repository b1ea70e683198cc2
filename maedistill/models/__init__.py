"""Networks: encoder, decoders, heads, patch masking and position tables."""
