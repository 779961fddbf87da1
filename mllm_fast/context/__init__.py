"""An image read once: its attended tokens compressed, kept, stored and asked again."""
