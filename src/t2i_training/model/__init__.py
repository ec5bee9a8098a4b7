"""The trained network: loading, adapters, EMA, optimizer, objective."""
