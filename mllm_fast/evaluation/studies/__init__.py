"""The evaluations of the vision-language model alone."""
