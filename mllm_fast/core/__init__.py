"""Code that every part of the library uses and that knows no model: errors, files, images, token layouts."""
