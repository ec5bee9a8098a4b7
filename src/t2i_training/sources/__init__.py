"""What a run is given: models and data, as folders here or names of the hub, looked at without torch."""
