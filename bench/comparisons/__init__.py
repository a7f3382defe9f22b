"""What is compared, part by part: each module's `comparisons(at)` lists its own and builds nothing yet."""
