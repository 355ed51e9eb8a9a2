"""Models larger than the memory they are given: layers that wait elsewhere and come when it is their turn."""
