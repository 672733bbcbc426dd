"""References of real clips: entities cut out of their videos by their masks."""
