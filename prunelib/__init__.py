"""A laboratory for making language models shallower and thinner without retraining them."""
