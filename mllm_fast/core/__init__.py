"""What every room uses and that knows no model: errors, files, images, the layout of a prompt's tokens."""
