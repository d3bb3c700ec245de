"""Whether routing changes training, and what it leaves out of the gradient on a trained policy."""
