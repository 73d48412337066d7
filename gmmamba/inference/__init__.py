"""Predictions on new slides by a trained experiment, with everything that explains them."""
