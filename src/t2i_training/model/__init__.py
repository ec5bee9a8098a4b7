"""What is trained, and how: networks, adapters, average, optimizer, objective."""
