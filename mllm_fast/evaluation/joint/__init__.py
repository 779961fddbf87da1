"""Evaluations of the joint model."""
