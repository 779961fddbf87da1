"""Judges that say whether an answer is right, by the truth of a scene, a list of nouns, or an endpoint."""
