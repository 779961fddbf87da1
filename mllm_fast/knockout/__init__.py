"""Who may not attend to whom: the rules a user writes and the tables the kernels read."""
