"""What a model writes: answers to a split's questions, and metrics of them."""
