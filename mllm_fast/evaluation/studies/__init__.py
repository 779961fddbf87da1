"""Evaluations of the vision-language model alone."""
