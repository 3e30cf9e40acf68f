"""One small module for each library: how its blocks are cut in two, and what its models do with tokens afterwards."""
