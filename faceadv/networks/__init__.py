"""Every architecture: plain modules from images in [0, 1], and how each is read from its file."""
