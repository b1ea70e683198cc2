"""Networks and their weights: encoder, decoder, heads, teacher."""
