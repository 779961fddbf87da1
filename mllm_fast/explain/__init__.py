"""Why a token was said: scores of heads and patches, heatmaps, their verification, the logit lens."""
