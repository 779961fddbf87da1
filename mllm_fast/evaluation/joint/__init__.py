"""The evaluations of the joint model."""
