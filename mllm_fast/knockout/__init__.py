"""Attention knockouts: the rules that a user writes, and the tables that the kernels read."""
