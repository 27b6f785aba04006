"""Predict how populations of single cells respond to a perturbation."""
