"""The embedded model: its scene generator, its training, its accuracy. The weights lie in weights/."""
