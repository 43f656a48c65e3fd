"""Runs both twins, measures where they differ, and says whether that is within the limits."""
