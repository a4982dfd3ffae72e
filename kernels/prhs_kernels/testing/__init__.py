"""Inputs, models and tolerances for the tests of this project and of code built on it."""
