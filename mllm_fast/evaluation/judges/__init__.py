"""Who says whether an answer is right: the scene's truth, a noun list, or an endpoint."""
