"""The heatmap methods that come with the package, one file each."""
