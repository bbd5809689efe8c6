"""Hyperparameter campaigns on Ray Tune: many runs of the same training function, one of which is the best."""
