"""From a compressed image to what the network reads."""
