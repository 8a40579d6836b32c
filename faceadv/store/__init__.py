"""What lies on the disk: paths, data sets, weights and the cache."""
